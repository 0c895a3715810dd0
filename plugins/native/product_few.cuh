// Products of up to 8 rows with quantized matrices. `Stream` (quant_stream.cuh, fp8_stream.cuh) reads the weights and multiplies; what is here
// is the same for all of them: which block has which columns, the norm of the input, partial sums, and what follows the product.
#pragma once

#include "few_rows.cuh"
#include "mma.cuh"
#include "normalize_few.cuh"

namespace qwen {

constexpr int kMostWarps = 16, kFewWarps = 8;
constexpr int kSmallN = 8192;
constexpr size_t kMostStaged = 40 << 10;  // bytes of normalized activations that a block keeps; more would leave an SM one block

template <typename Matrix>
struct FewProduct {
  Matrix w;
  const void *x, *tail, *residual, *norm;
  void* y;
  float eps;
  int M, N, tail_rows, tiles;  // N: columns of y that come from w
  int staged;                  // where in shared memory activations are kept, normalized; 0: each warp reads those that it needs
  void* normed;                // [M,K] that norm(x) may be put into, or null
};

// `count` elements are on their way to the second-level cache. A tail has too few blocks to wait for memory when its turn has come.
template <typename T>
__device__ void prefetch_rows(const T* from, size_t count) {
  constexpr int kLine = 128 / sizeof(T);
  for (size_t i = threadIdx.x * size_t(kLine); i < count; i += blockDim.x * kLine) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
}

// A warp's part of x [first row] times 16 rows of an ordinary matrix: sum as of a stream, with rows g and g + 8.
template <typename T, typename Activations>
__device__ void plain_tile(const T* w, int rows, int K, int warp, int warps, int g, int t, const Activations& activations, float (&sum)[4]) {
  const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll 4
  for (int k = warp * kStep + t * 8; k - t * 8 < K; k += warps * kStep) {
    const uint4 a = g < rows && k < K ? *reinterpret_cast<const uint4*>(w + size_t(g) * K + k) : zero;
    const uint4 d = g + 8 < rows && k < K ? *reinterpret_cast<const uint4*>(w + size_t(g + 8) * K + k) : zero;
    const uint4 x = activations(k);
    multiply<T>(sum, a.x, d.x, a.y, d.y, x.x, x.y);
    multiply<T>(sum, a.z, d.z, a.w, d.w, x.z, x.w);
  }
}

// Eight activations times `scale` and the weight of the norm.
template <typename T>
__device__ uint4 normalized(const T* x, const T* norm, float scale) {
  Pack8<T> values, weight;
  values.bits = *reinterpret_cast<const uint4*>(x);
  weight.bits = *reinterpret_cast<const uint4*>(norm);
#pragma unroll
  for (int i = 0; i < 8; i++) values.item[i] = from_float<T>(to_float(values.item[i]) * scale * to_float(weight.item[i]));
  return values.bits;
}

// M rounded up to a power of two.
__host__ __device__ inline int log_rows_of(int M) { return M == 1 ? 0 : M == 2 ? 1 : M <= 4 ? 2 : 3; }

// Where the activations of a product are: in memory, in shared memory as well, or to be normalized, which FewProduct::staged says how.
enum class Activations { kMemory, kStaged, kNormalized };

// A block makes 16 or 32 columns of y, of one panel or two neighbors, or, SWIGLU, 16 of a gate and an up panel. Behind those of w come
// blocks of 16 columns of `tail`.
template <typename T, typename Stream, Activations FROM, bool SWIGLU>
__global__ void __maxnreg__(Stream::kRegisters) product_few_kernel(FewProduct<typename Stream::Matrix> given) {
  constexpr int PANELS = Stream::kPanels, kSums = PANELS * 128;
  constexpr bool NORM = FROM == Activations::kNormalized;
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ float inverse[kFewColumns];
  const auto& w = given.w;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, K = w.K, M = given.M;
  const T *x = static_cast<const T*>(given.x), *norm = static_cast<const T*>(given.norm), *residual = static_cast<const T*>(given.residual);
  const bool is_tail = !SWIGLU && int(blockIdx.x) >= given.tiles;
  const int panels = w.panels(), half = SWIGLU ? panels / 2 : 0;

  const Stream stream(w, shared, warp);
  const int count = is_tail || warp >= stream.units() ? 0 : (stream.units() - warp + warps - 1) / warps;
  // The second panel of the last tile may not exist: the last one is read twice.
  const auto panel = [&](int, int p) { return w.panel(SWIGLU ? int(blockIdx.x) + p * half : min(PANELS * int(blockIdx.x) + p, panels - 1)); };
  const auto unit = [&](int u) { return warp + u * warps; };
  const int tail_row = is_tail ? (int(blockIdx.x) - given.tiles) * kPanelRows : 0;
  const T* const tail = is_tail ? static_cast<const T*>(given.tail) + size_t(tail_row) * K : nullptr;
  if (is_tail)
    prefetch_rows(tail, size_t(min(kPanelRows, given.tail_rows - tail_row)) * K);
  else
    stream.start(panel, unit, count);
  // The address is one of shared memory in any case, and the loads are, too: one that may be null would make them general ones.
  const bool staged = FROM == Activations::kStaged || (NORM && given.staged);
  const FewRows<T> rows{x, reinterpret_cast<uint4*>(shared + given.staged), M, K, log_rows_of(M), w.units() * kUnitChunks};
  const uint4 weight = rows.first_weight(norm);
  wait_for_previous();
  let_next_start();

  const int width = given.N + given.tail_rows, m_out = threadIdx.x / 32;
  const int column = is_tail ? given.N + tail_row + lane : int(blockIdx.x) * PANELS * kPanelRows + lane;
  const bool writes = m_out < M && column < (is_tail ? width : given.N) && lane < (is_tail ? 1 : PANELS) * kPanelRows;
  float added = 0.0f;  // the residual of the one value that this thread will write
  if (!SWIGLU && residual != nullptr && writes) added = to_float(residual[size_t(m_out) * width + column]);

  if (staged) {
    rows.stage(NORM ? norm : nullptr, weight, given.eps);
  } else if (NORM) {
    for (int m = warp; m < M; m += warps) {  // summed in the order of FewRows
      float sum = 0.0f;
      for (int group = 0; group * kChunkGroup * kChunk < K; group++) {
        Pack8<T> p;
        p.bits = rows.load(m, group * kChunkGroup + lane);
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) square += to_float(p.item[i]) * to_float(p.item[i]);
        square = warp_sum(square);
        if (group % 32 == lane) sum += square;
      }
      sum = warp_sum(sum);
      if (lane == 0) inverse[m] = rsqrtf(sum / K + given.eps);
    }
    __syncthreads();
  }
  const float scale = NORM && !staged && g < M ? inverse[g] : 1.0f;
  const auto activations = [&](int k) {
    if (g >= M || k >= K) return make_uint4(0, 0, 0, 0);
    if (staged) return rows.staged[rows.place(g, k / kChunk)];
    if constexpr (NORM) return normalized(x + size_t(g) * K + k, norm + k, scale);
    return *reinterpret_cast<const uint4*>(x + size_t(g) * K + k);
  };

  float sum[PANELS][4] = {};
  float* partial = reinterpret_cast<float*>(shared);
  if (is_tail) {
    plain_tile<T>(tail, given.tail_rows - tail_row, K, warp, warps, g, t, activations, sum[0]);
  } else {
    stream.run(panel, unit, count, [&](int, int k) { return activations(k); }, [](int) { return 1.0f; }, sum);
  }
  __syncthreads();  // the buffers of all warps become the partial sums
  partial += warp * kSums;
  if (is_tail) {
#pragma unroll
    for (int i = 0; i < 4; i++) partial[(2 * t + i % 2) * kPanelRows + g + i / 2 * 8] = sum[0][i];
  } else {
    store_sums(sum, partial, g, t);
  }
  __syncthreads();

  const float* all = reinterpret_cast<const float*>(shared);
  const auto total = [&](int index) {
    float value = 0.0f;
    for (int first = 0; first < warps; first += kFewWarps) {  // warps are a multiple
#pragma unroll
      for (int i = 0; i < kFewWarps; i++) value += all[(first + i) * kSums + index];
    }
    return value;
  };
  T* y = static_cast<T*>(given.y);
  if constexpr (SWIGLU) {
    if (m_out < M && lane < kPanelRows) {
      const float gate = total(m_out * kPanelRows + lane), up = total(128 + m_out * kPanelRows + lane);
      y[size_t(m_out) * width + blockIdx.x * kPanelRows + lane] = from_float<T>(silu(gate) * up);
    }
  } else if (writes) {
    y[size_t(m_out) * width + column] = from_float<T>(total(lane / kPanelRows * 128 + m_out * kPanelRows + lane % kPanelRows) + added);
  }
}

inline int most_shared() {
  static const int bytes = [] {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
    return value - 1024;
  }();
  return bytes;
}

template <typename T, typename Stream, Activations FROM, bool SWIGLU>
void start_few(const FewProduct<typename Stream::Matrix>& given, int blocks, int warps, size_t shared, cudaStream_t stream) {
  constexpr auto kernel = product_few_kernel<T, Stream, FROM, SWIGLU>;
  static DeviceFlags allowed;
  allowed.once([] {
    const size_t wanted = Stream::kBytesPerWarp * kMostWarps + kMostStaged, most = size_t(most_shared());
    allow_shared(kernel, wanted < most ? wanted : most);
  });
  launch(kernel, dim3(blocks), dim3(warps * 32), shared, stream, given);
}

template <typename T, typename Stream, bool NORM, bool SWIGLU>
void run_few(FewProduct<typename Stream::Matrix> given, cudaStream_t stream) {
  constexpr int kColumns = Stream::kPanels * kPanelRows;
  given.tiles = SWIGLU ? given.N / kPanelRows : (given.N + kColumns - 1) / kColumns;
  const int blocks = given.tiles + (given.tail_rows + kPanelRows - 1) / kPanelRows;
  // Few blocks need more warps each to keep as many loads in flight.
  const bool many = blocks <= 264 && given.w.units() >= 2 * kFewWarps && Stream::kBytesPerWarp * kMostWarps <= size_t(most_shared());
  const int warps = many ? kMostWarps : kFewWarps;
  const size_t ring = Stream::kBytesPerWarp * warps, rows = FewRows<T>::staged_bytes(given.w.units() * kUnitChunks, log_rows_of(given.M));
  // Without a norm only where a warp would wait for its activations more than once, and no other block could work.
  given.staged = (NORM || (blocks <= 264 && given.w.units() > warps)) && rows <= kMostStaged && ring + rows <= size_t(most_shared()) ? int(ring) : 0;
  const size_t bytes = ring + (given.staged ? rows : 0);
  if constexpr (NORM) {
    start_few<T, Stream, Activations::kNormalized, SWIGLU>(given, blocks, warps, bytes, stream);
  } else {
    given.staged ? start_few<T, Stream, Activations::kStaged, SWIGLU>(given, blocks, warps, bytes, stream)
                 : start_few<T, Stream, Activations::kMemory, SWIGLU>(given, blocks, warps, bytes, stream);
  }
}

// Stream<T, PANELS>: two panels share the activations; one each where that makes too few blocks.
template <typename T, template <typename, int> typename Stream, bool SWIGLU, typename Matrix>
void product_few(FewProduct<Matrix> given, cudaStream_t stream) {
  constexpr int kSingle = SWIGLU ? 2 : 1;
  // Several rows: there are more blocks than have room at a time, and each that normalizes all rows takes longer than a launch that does it once.
  if (given.M > 1 && given.norm != nullptr && given.normed != nullptr &&
      normalize_few<T>(static_cast<const T*>(given.x), static_cast<const T*>(given.norm), given.eps, static_cast<T*>(given.normed), given.M, given.w.K, stream))
    given.x = given.normed, given.norm = nullptr;
  const bool single = !SWIGLU && given.N <= kSmallN;
  if (given.norm != nullptr)
    single ? run_few<T, Stream<T, kSingle>, true, SWIGLU>(given, stream) : run_few<T, Stream<T, 2>, true, SWIGLU>(given, stream);
  else
    single ? run_few<T, Stream<T, kSingle>, false, SWIGLU>(given, stream) : run_few<T, Stream<T, 2>, false, SWIGLU>(given, stream);
}

}  // namespace qwen
