// A visit is a token at one of its experts, number token * K + j. Its inner activations, [visits,I], are stored in the workspace in that order.
#include "quant_moe.cuh"

#include "quant_stream.cuh"

namespace qwen {
namespace {

constexpr int kWarps = 8;

// What the kernels share. Many tokens: the visits of expert e are visits[e * tokens ...], and there are counts[e].
template <typename T>
struct Work {
  QuantMoe moe;
  const T *x, *logits;
  T* y;
  int* expert;    // [visits]
  float* weight;  // [visits]
  T* inner;       // [visits,I]
  int* counts;    // [E]
  int* visits;    // [E,tokens]
  float* out;     // [visits,H]
  bool grouped;
};

// A warp selects the experts of a token.
template <typename T>
__global__ void route_kernel(Work<T> work) {
  wait_for_previous();
  let_next_start();
  const int token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, E = work.moe.E, K = work.moe.K;
  if (token >= work.moe.tokens) return;
  constexpr int kPerLane = kMostExperts / 32;
  float value[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    const int e = i * 32 + lane;
    value[i] = e < E ? to_float(work.logits[size_t(token) * E + e]) : -INFINITY;
  }
  float mine = 0.0f, largest = 0.0f;  // the logit of the choice that this lane keeps
  int kept = 0;
  for (int j = 0; j < K; j++) {
    float best = -INFINITY;
    int at = kMostExperts;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      if (value[i] > best) best = value[i], at = i * 32 + lane;
    }
#pragma unroll
    for (int step = 16; step; step /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, best, step);
      const int other_at = __shfl_xor_sync(0xffffffffu, at, step);
      if (other > best || (other == best && other_at < at)) best = other, at = other_at;
    }
    if (at >= E) at = j;  // no number is left: the logits are not finite
    if (j == 0) largest = best;
    if (lane == j) mine = best, kept = at;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      if (i * 32 + lane == at) value[i] = -INFINITY;
    }
  }
  const float share = lane < K ? __expf(mine - largest) : 0.0f;
  const float all = warp_sum(share);
  if (lane < K) {
    const int visit = token * K + lane;
    work.expert[visit] = kept;
    work.weight[visit] = share / all;
    if (work.grouped) {
      const int place = atomicAdd(&work.counts[kept], 1);
      if (place < work.moe.tokens) work.visits[size_t(kept) * work.moe.tokens + place] = visit;
    }
  }
}

__device__ inline uint4 none() { return make_uint4(0, 0, 0, 0); }

// 8 visits at most: `visit` is that of lane group g, -1 where there is none.
template <typename T, int BITS>
__device__ void gate_up_tile(const Work<T>& work, const QuantStream<T, BITS, 2>& stream, const uint8_t* matrix, int visit, char* shared, int (&of)[kQuantColumns]) {
  const QuantMatrix& w = work.moe.gate_up;
  const int warp = threadIdx.x / 32, H = work.moe.H, I = work.moe.I, units = stream.layout.units;
  const int count = warp >= units ? 0 : (units - warp + kWarps - 1) / kWarps;
  const auto panel = [&](int, int p) { return matrix + size_t(blockIdx.x + p * (I / kPanelRows)) * w.panel_bytes(); };
  const auto unit = [&](int u) { return warp + u * kWarps; };
  const T* row = work.x + size_t(max(visit, 0) / work.moe.K) * H;
  stream.start(panel, unit, count);
  float sum[2][4] = {};
  stream.run(
      panel, unit, count, [&](int, int k) { return visit >= 0 && k < H ? *reinterpret_cast<const uint4*>(row + k) : none(); },
      [](int) { return 1.0f; }, sum);
  __syncthreads();
  float* partial = reinterpret_cast<float*>(shared);
  store_sums(sum, partial + warp * 256, stream.g, stream.t);
  __syncthreads();
  const int m = threadIdx.x / 16, r = threadIdx.x % 16;
  if (m < kQuantColumns && of[m] >= 0) {
    float gate = 0.0f, up = 0.0f;
    for (int i = 0; i < kWarps; i++) gate += partial[i * 256 + m * 16 + r], up += partial[i * 256 + 128 + m * 16 + r];
    work.inner[size_t(of[m]) * I + blockIdx.x * kPanelRows + r] = from_float<T>(silu(gate) * up);
  }
}

// Few tokens: block (panel, visit). The first visit of an expert does the work of all of them: a token visits it once, so they are 8 at most.
template <typename T, int BITS>
__global__ void __launch_bounds__(kWarps * 32) gate_up_few_kernel(Work<T> work) {
  extern __shared__ __align__(16) char shared[];
  __shared__ int of[kQuantColumns];
  wait_for_previous();
  let_next_start();
  const int own = blockIdx.y, e = work.expert[own], K = work.moe.K;
  if (threadIdx.x < kQuantColumns) {
    int found = -1;
    if (int(threadIdx.x) < work.moe.tokens) {
      for (int j = 0; j < K; j++) {
        if (work.expert[threadIdx.x * K + j] == e) found = threadIdx.x * K + j;
      }
    }
    of[threadIdx.x] = found;
  }
  __syncthreads();
  for (int m = 0; m < own / K; m++) {
    if (of[m] >= 0) return;
  }
  const QuantStream<T, BITS, 2> stream(work.moe.gate_up, shared, threadIdx.x / 32);
  gate_up_tile<T, BITS>(work, stream, work.moe.gate_up.packed + size_t(e) * work.moe.gate_up.bytes(), of[stream.g], shared, of);
}

// Many: block (panel, expert).
template <typename T, int BITS>
__global__ void __launch_bounds__(kWarps * 32) gate_up_many_kernel(Work<T> work) {
  extern __shared__ __align__(16) char shared[];
  __shared__ int of[kQuantColumns];
  wait_for_previous();
  let_next_start();
  const int e = blockIdx.y, count = min(work.counts[e], work.moe.tokens);
  const QuantStream<T, BITS, 2> stream(work.moe.gate_up, shared, threadIdx.x / 32);
  for (int first = 0; first < count; first += kQuantColumns) {
    __syncthreads();
    if (threadIdx.x < kQuantColumns)
      of[threadIdx.x] = first + int(threadIdx.x) < count ? work.visits[size_t(e) * work.moe.tokens + first + threadIdx.x] : -1;
    __syncthreads();
    gate_up_tile<T, BITS>(work, stream, work.moe.gate_up.packed + size_t(e) * work.moe.gate_up.bytes(), of[stream.g], shared, of);
  }
}

// Few tokens: block (panel, token) adds up the token's experts, in their order.
template <typename T, int BITS>
__global__ void __launch_bounds__(kWarps * 32) down_few_kernel(Work<T> work) {
  extern __shared__ __align__(16) char shared[];
  const QuantMatrix& w = work.moe.down;
  const int token = blockIdx.y, warp = threadIdx.x / 32, H = work.moe.H, I = work.moe.I, K = work.moe.K;
  const QuantStream<T, BITS, 1> stream(w, shared, warp);
  const int units = stream.layout.units, all = units * K, count = warp >= all ? 0 : (all - warp + kWarps - 1) / kWarps;
  const auto visit = [&](int u) { return token * K + (warp + u * kWarps) / units; };
  const auto panel = [&](int u, int) { return w.packed + size_t(work.expert[visit(u)]) * w.bytes() + size_t(blockIdx.x) * w.panel_bytes(); };
  const auto unit = [&](int u) { return (warp + u * kWarps) % units; };
  // The experts were selected by the kernel before the previous one, which is complete.
  stream.start(panel, unit, count);
  wait_for_previous();
  let_next_start();
  float sum[1][4] = {};
  stream.run(
      panel, unit, count,
      [&](int u, int k) { return stream.g == 0 && k < I ? *reinterpret_cast<const uint4*>(work.inner + size_t(visit(u)) * I + k) : none(); },
      [&](int u) { return work.weight[visit(u)]; }, sum);
  __syncthreads();
  float* partial = reinterpret_cast<float*>(shared);
  store_sums(sum, partial + warp * 128, stream.g, stream.t);
  __syncthreads();
  const int column = blockIdx.x * kPanelRows + threadIdx.x;
  if (threadIdx.x >= kPanelRows || column >= H) return;
  float value = 0.0f;
  for (int i = 0; i < kWarps; i++) value += partial[i * 128 + threadIdx.x];
  work.y[size_t(token) * H + column] = from_float<T>(value);
}

// Many: block (two panels, expert) writes the rows of its visits.
template <typename T, int BITS>
__global__ void __launch_bounds__(kWarps * 32) down_many_kernel(Work<T> work) {
  extern __shared__ __align__(16) char shared[];
  wait_for_previous();
  let_next_start();
  const QuantMatrix& w = work.moe.down;
  const int e = blockIdx.y, warp = threadIdx.x / 32, H = work.moe.H, I = work.moe.I, panels = w.panels(), found = min(work.counts[e], work.moe.tokens);
  const QuantStream<T, BITS, 2> stream(w, shared, warp);
  const int units = stream.layout.units, count = warp >= units ? 0 : (units - warp + kWarps - 1) / kWarps;
  const uint8_t* matrix = w.packed + size_t(e) * w.bytes();
  const int* visits = work.visits + size_t(e) * work.moe.tokens;
  const auto panel = [&](int, int p) { return matrix + size_t(min(2 * int(blockIdx.x) + p, panels - 1)) * w.panel_bytes(); };
  const auto unit = [&](int u) { return warp + u * kWarps; };
  float* partial = reinterpret_cast<float*>(shared);
  for (int first = 0; first < found; first += kQuantColumns) {
    __syncthreads();
    stream.start(panel, unit, count);
    const T* row = first + stream.g < found ? work.inner + size_t(visits[first + stream.g]) * I : nullptr;
    float sum[2][4] = {};
    stream.run(
        panel, unit, count, [&](int, int k) { return row != nullptr && k < I ? *reinterpret_cast<const uint4*>(row + k) : none(); },
        [](int) { return 1.0f; }, sum);
    __syncthreads();
    store_sums(sum, partial + warp * 256, stream.g, stream.t);
    __syncthreads();
    const int m = threadIdx.x / 32, n = threadIdx.x % 32, column = blockIdx.x * 2 * kPanelRows + n;
    if (first + m < found && column < H) {
      float value = 0.0f;
      for (int i = 0; i < kWarps; i++) value += partial[i * 256 + n / kPanelRows * 128 + m * kPanelRows + n % kPanelRows];
      work.out[size_t(visits[first + m]) * H + column] = value;
    }
  }
}

// y[token] = the weighed sum of its visits, in their order.
template <typename T>
__global__ void combine_kernel(Work<T> work) {
  wait_for_previous();
  let_next_start();
  const int H = work.moe.H, K = work.moe.K, column = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
  if (column >= H) return;
  float value = 0.0f;
  for (int j = 0; j < K; j++) {
    const size_t visit = size_t(token) * K + j;
    value += work.weight[visit] * work.out[visit * H + column];
  }
  work.y[size_t(token) * H + column] = from_float<T>(value);
}

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

bool few(const QuantMoe& moe) { return moe.tokens <= kQuantColumns; }

// The parts of the workspace; `base` null: only the size.
template <typename T>
size_t place(Work<T>& work, size_t element, char* base) {
  const QuantMoe& moe = work.moe;
  const size_t visits = size_t(moe.tokens) * moe.K;
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    char* here = base + at;
    at += aligned(bytes);
    return here;
  };
  work.expert = reinterpret_cast<int*>(take(visits * sizeof(int)));
  work.weight = reinterpret_cast<float*>(take(visits * sizeof(float)));
  work.inner = reinterpret_cast<T*>(take(visits * moe.I * element));
  if (!few(moe)) {
    work.counts = reinterpret_cast<int*>(take(moe.E * sizeof(int)));
    work.visits = reinterpret_cast<int*>(take(size_t(moe.E) * moe.tokens * sizeof(int)));
    work.out = reinterpret_cast<float*>(take(visits * moe.H * sizeof(float)));
  }
  return at;
}

template <typename T, int BITS, int PANELS, typename Kernel>
void start(Kernel kernel, dim3 grid, cudaStream_t stream, const Work<T>& work) {
  constexpr size_t bytes = QuantStream<T, BITS, PANELS>::kBytesPerWarp * kWarps;
  allow_shared(kernel, bytes);
  launch(kernel, grid, dim3(kWarps * 32), bytes, stream, work);
}

}  // namespace

size_t quant_moe_workspace(const QuantMoe& moe, size_t element) {
  Work<__half> work{moe};
  return place(work, element, nullptr);
}

template <typename T>
void quant_moe(const QuantMoe& moe, const T* x, const T* logits, T* y, void* workspace, cudaStream_t stream) {
  Work<T> work{moe, x, logits, y};
  work.grouped = !few(moe);
  place(work, sizeof(T), static_cast<char*>(workspace));
  if (work.grouped) check(cudaMemsetAsync(work.counts, 0, moe.E * sizeof(int), stream), "cudaMemsetAsync");
  launch(route_kernel<T>, dim3((moe.tokens + 3) / 4), dim3(128), 0, stream, work);
  const unsigned gates = moe.I / kPanelRows, downs = (moe.H + 2 * kPanelRows - 1) / (2 * kPanelRows);
  if (!work.grouped) {
    const dim3 up(gates, moe.tokens * moe.K), back(moe.down.panels(), moe.tokens);
    moe.gate_up.bits == 4 ? start<T, 4, 2>(gate_up_few_kernel<T, 4>, up, stream, work) : start<T, 8, 2>(gate_up_few_kernel<T, 8>, up, stream, work);
    moe.down.bits == 4 ? start<T, 4, 1>(down_few_kernel<T, 4>, back, stream, work) : start<T, 8, 1>(down_few_kernel<T, 8>, back, stream, work);
    return;
  }
  const dim3 up(gates, moe.E), back(downs, moe.E);
  moe.gate_up.bits == 4 ? start<T, 4, 2>(gate_up_many_kernel<T, 4>, up, stream, work) : start<T, 8, 2>(gate_up_many_kernel<T, 8>, up, stream, work);
  moe.down.bits == 4 ? start<T, 4, 2>(down_many_kernel<T, 4>, back, stream, work) : start<T, 8, 2>(down_many_kernel<T, 8>, back, stream, work);
  launch(combine_kernel<T>, dim3((moe.H + 127) / 128, moe.tokens), dim3(128), 0, stream, work);
}

template void quant_moe<__half>(const QuantMoe&, const __half*, const __half*, __half*, void*, cudaStream_t);
template void quant_moe<__nv_bfloat16>(const QuantMoe&, const __nv_bfloat16*, const __nv_bfloat16*, __nv_bfloat16*, void*, cudaStream_t);

}  // namespace qwen
