#include "quant.cuh"

#include "quant_stream.cuh"

namespace qwen {
namespace {

constexpr int kMostWarps = 16, kFewWarps = 8;
constexpr int kSmallN = 8192;

struct Product {
  QuantMatrix w;
  const void *x, *tail, *residual, *norm;
  void* y;
  float eps;
  int M, N, tail_rows, tiles;  // N: columns of y that come from w
};

// A warp's part of x [first row] times 16 rows of an ordinary matrix: sum as of QuantStream, with rows g and g + 8.
template <typename T, typename Activations>
__device__ void plain_tile(const T* w, int rows, int K, int warp, int warps, int g, int t, const Activations& activations, float (&sum)[4]) {
  const uint4 zero = make_uint4(0, 0, 0, 0);
  for (int k = warp * kStep + t * 8; k - t * 8 < K; k += warps * kStep) {
    const uint4 a = g < rows && k < K ? *reinterpret_cast<const uint4*>(w + size_t(g) * K + k) : zero;
    const uint4 d = g + 8 < rows && k < K ? *reinterpret_cast<const uint4*>(w + size_t(g + 8) * K + k) : zero;
    const uint4 x = activations(k);
    multiply<T>(sum, a.x, d.x, a.y, d.y, x.x, x.y);
    multiply<T>(sum, a.z, d.z, a.w, d.w, x.z, x.w);
  }
}

// A block makes 16 or 32 columns of y, of one panel or two neighbors, or, SWIGLU, 16 of a gate and an up panel. Behind those of w come
// blocks of 16 columns of `tail`.
template <typename T, int BITS, int PANELS, bool NORM, bool SWIGLU>
__global__ void __launch_bounds__(kMostWarps * 32) quant_kernel(Product given) {
  using Stream = QuantStream<T, BITS, PANELS>;
  constexpr int kSums = PANELS * 128;
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ float inverse[kQuantColumns];
  const QuantMatrix& w = given.w;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, K = w.K, M = given.M;
  const T *x = static_cast<const T*>(given.x), *norm = static_cast<const T*>(given.norm), *residual = static_cast<const T*>(given.residual);
  const bool is_tail = !SWIGLU && int(blockIdx.x) >= given.tiles;
  const int panels = w.panels(), half = SWIGLU ? panels / 2 : 0;

  const Stream stream(w, shared, warp);
  const int count = is_tail || warp >= stream.layout.units ? 0 : (stream.layout.units - warp + warps - 1) / warps;
  const auto panel = [&](int, int p) {
    // The second panel of the last tile may not exist: the last one is read twice.
    const int index = SWIGLU ? int(blockIdx.x) + p * half : min(PANELS * int(blockIdx.x) + p, panels - 1);
    return w.packed + size_t(index) * w.panel_bytes();
  };
  const auto unit = [&](int u) { return warp + u * warps; };
  stream.start(panel, unit, count);
  wait_for_previous();
  let_next_start();

  if constexpr (NORM) {
    for (int m = warp; m < M; m += warps) {
      float sum = 0.0f;
      for (int k = lane * 8; k < K; k += 256) {
        Pack8<T> p;
        p.bits = *reinterpret_cast<const uint4*>(x + size_t(m) * K + k);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += to_float(p.item[i]) * to_float(p.item[i]);
      }
      sum = warp_sum(sum);
      if (lane == 0) inverse[m] = rsqrtf(sum / K + given.eps);
    }
    __syncthreads();
  }
  const float scale = NORM && g < M ? inverse[g] : 1.0f;
  const auto activations = [&](int k) {
    Pack8<T> b;
    b.bits = make_uint4(0, 0, 0, 0);
    if (g < M && k < K) {
      b.bits = *reinterpret_cast<const uint4*>(x + size_t(g) * K + k);
      if constexpr (NORM) {
        Pack8<T> weight;
        weight.bits = *reinterpret_cast<const uint4*>(norm + k);
#pragma unroll
        for (int i = 0; i < 8; i++) b.item[i] = from_float<T>(to_float(b.item[i]) * scale * to_float(weight.item[i]));
      }
    }
    return b.bits;
  };

  float sum[PANELS][4] = {};
  const int tail_row = is_tail ? (int(blockIdx.x) - given.tiles) * kPanelRows : 0;
  float* partial = reinterpret_cast<float*>(shared);
  if (is_tail) {
    const T* tail = static_cast<const T*>(given.tail) + size_t(tail_row) * K;
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
    for (int i = 0; i < warps; i++) value += all[i * kSums + index];
    return value;
  };
  const int width = given.N + given.tail_rows, m = threadIdx.x / 32;
  T* y = static_cast<T*>(given.y);
  if (m >= M) return;
  if constexpr (SWIGLU) {
    if (lane < kPanelRows) {
      const float gate = total(m * kPanelRows + lane), up = total(128 + m * kPanelRows + lane);
      y[size_t(m) * width + blockIdx.x * kPanelRows + lane] = from_float<T>(silu(gate) * up);
    }
  } else {
    const int p = lane / kPanelRows, r = lane % kPanelRows;
    const int column = is_tail ? given.N + tail_row + lane : int(blockIdx.x) * PANELS * kPanelRows + lane;
    if (column >= (is_tail ? width : given.N) || p >= (is_tail ? 1 : PANELS)) return;
    const size_t at = size_t(m) * width + column;
    const float value = total(p * 128 + m * kPanelRows + r);
    y[at] = from_float<T>(residual != nullptr ? value + to_float(residual[at]) : value);
  }
}

int most_shared() {
  static const int bytes = [] {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
    return value - 1024;
  }();
  return bytes;
}

template <typename T, int BITS, int PANELS, bool NORM, bool SWIGLU>
void run(Product given, cudaStream_t stream) {
  using Stream = QuantStream<T, BITS, PANELS>;
  constexpr auto kernel = quant_kernel<T, BITS, PANELS, NORM, SWIGLU>;
  given.tiles = SWIGLU ? given.N / kPanelRows : (given.N + PANELS * kPanelRows - 1) / (PANELS * kPanelRows);
  const int blocks = given.tiles + (given.tail_rows + kPanelRows - 1) / kPanelRows;
  // Few blocks need more warps each to keep as many loads in flight.
  const int units = (given.w.padded() + kUnit - 1) / kUnit;
  const bool many = blocks <= 264 && units >= 2 * kFewWarps && Stream::kBytesPerWarp * kMostWarps <= size_t(most_shared());
  const int warps = many ? kMostWarps : kFewWarps;
  static DeviceFlags allowed;
  allowed.once([] {
    const size_t wanted = Stream::kBytesPerWarp * kMostWarps, most = size_t(most_shared());
    allow_shared(kernel, wanted < most ? wanted : most);
  });
  launch(kernel, dim3(blocks), dim3(warps * 32), Stream::kBytesPerWarp * warps, stream, given);
}

template <typename T, int BITS, bool SWIGLU>
void dispatch(const Product& given, cudaStream_t stream) {
  // Two panels share the normalized activations; one each where that makes too few blocks.
  const bool single = !SWIGLU && given.N <= kSmallN;
  if (given.norm != nullptr)
    single ? run<T, BITS, SWIGLU ? 2 : 1, true, SWIGLU>(given, stream) : run<T, BITS, 2, true, SWIGLU>(given, stream);
  else
    single ? run<T, BITS, SWIGLU ? 2 : 1, false, SWIGLU>(given, stream) : run<T, BITS, 2, false, SWIGLU>(given, stream);
}

template <typename T, bool SWIGLU>
void dispatch(const Product& given, cudaStream_t stream) {
  given.w.bits == 4 ? dispatch<T, 4, SWIGLU>(given, stream) : dispatch<T, 8, SWIGLU>(given, stream);
}

// Eight neighboring values of a row, from k on (a multiple of 8).
template <typename T>
__device__ uint4 eight(const QuantMatrix& w, int row, int k) {
  const uint8_t* panel = w.packed + size_t(row / kPanelRows) * w.panel_bytes();
  const int r = row % kPanelRows, block = k / w.block, inside = block % kGroupBlocks;
  const uint8_t* group = panel + size_t(block / kGroupBlocks) * w.group_bytes();
  const int at = inside * kPanelRows + r;
  const float scale = w.wide_scales ? reinterpret_cast<const float*>(group)[at] : __half2float(reinterpret_cast<const __half*>(group)[at]);
  const int zero = w.zeros ? group[w.zeros_at() + at] : 1 << (w.bits - 1);
  const uint8_t* codes = group + w.codes_at() + inside * w.block_bytes() + (k % w.block) * (kPanelRows * w.bits / 8);
  Pack8<T> values;
  if (w.bits == 4) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(codes + r * 4);
#pragma unroll
    for (int i = 0; i < 8; i++) values.item[i] = from_float<T>(scale * float(int(word >> (i % 4 * 8 + i / 4 * 4) & 15) - zero));
  } else {
    const uint32_t low = *reinterpret_cast<const uint32_t*>(codes + r * 4), high = *reinterpret_cast<const uint32_t*>(codes + 64 + r * 4);
#pragma unroll
    for (int i = 0; i < 8; i++) values.item[i] = from_float<T>(scale * float(int((i < 4 ? low : high) >> (i % 4 * 8) & 255) - zero));
  }
  return values.bits;
}

// Neighboring threads take neighboring rows of a panel, whose codes are stored together, four of them 8 k further.
template <typename T>
__global__ void dequantize_kernel(QuantMatrix w, int first_row, int rows, T* out) {
  wait_for_previous();
  let_next_start();
  const int row = blockIdx.y * kPanelRows + threadIdx.x % kPanelRows, k = (blockIdx.x * (blockDim.x / kPanelRows) + threadIdx.x / kPanelRows) * 8;
  if (row < rows && k < w.K) *reinterpret_cast<uint4*>(out + size_t(row) * w.K + k) = eight<T>(w, first_row + row, k);
}

template <typename T>
__global__ void gather_kernel(QuantMatrix w, const int64_t* ids, T* y) {
  wait_for_previous();
  let_next_start();
  const int64_t id = ids[blockIdx.x];
  for (int k = threadIdx.x * 8; k < w.K; k += blockDim.x * 8)
    *reinterpret_cast<uint4*>(y + size_t(blockIdx.x) * w.K + k) = id >= 0 && id < w.N ? eight<T>(w, int(id), k) : make_uint4(0, 0, 0, 0);
}

}  // namespace

template <typename T>
void quant_linear(const QuantMatrix& w, const T* x, const T* tail, int tail_rows, const T* residual, const T* norm, float eps, T* y, int M, cudaStream_t stream) {
  dispatch<T, false>({w, x, tail, residual, norm, y, eps, M, w.N, tail_rows, 0}, stream);
}

template <typename T>
void quant_swiglu(const QuantMatrix& w, const T* x, const T* norm, float eps, T* y, int M, cudaStream_t stream) {
  dispatch<T, true>({w, x, nullptr, nullptr, norm, y, eps, M, w.N / 2, 0, 0}, stream);
}

template <typename T>
void dequantize(const QuantMatrix& w, int first_panel, int rows, T* out, cudaStream_t stream) {
  const int threads = 256, columns = threads / kPanelRows * 8;
  launch(dequantize_kernel<T>, dim3((w.K + columns - 1) / columns, (rows + kPanelRows - 1) / kPanelRows), dim3(threads), 0, stream, w,
         first_panel * kPanelRows, rows, out);
}

template <typename T>
void quant_gather(const QuantMatrix& w, const int64_t* ids, T* y, int count, cudaStream_t stream) {
  launch(gather_kernel<T>, dim3(count), dim3(128), 0, stream, w, ids, y);
}

#define INSTANTIATE(T)                                                                                                                \
  template void quant_linear<T>(const QuantMatrix&, const T*, const T*, int, const T*, const T*, float, T*, int, cudaStream_t);       \
  template void quant_swiglu<T>(const QuantMatrix&, const T*, const T*, float, T*, int, cudaStream_t);                                \
  template void dequantize<T>(const QuantMatrix&, int, int, T*, cudaStream_t);                                                        \
  template void quant_gather<T>(const QuantMatrix&, const int64_t*, T*, int, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
