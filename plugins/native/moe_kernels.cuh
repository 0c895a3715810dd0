// The routed experts of a layer, over matrices of any codes (`Stream`). A visit is a token at one of its experts, number token * K + j. Its inner
// activations, [visits,I], are stored in the workspace in that order.
#pragma once

#include "choose_experts.cuh"
#include "panels.cuh"

namespace qwen {

constexpr int kMoeWarps = 8;

// What the kernels share. Many tokens: the visits of expert e are visits[e * tokens ...], and there are counts[e].
template <typename T, typename Matrix>
struct Work {
  Experts<Matrix> moe;
  const T *x, *logits;
  T* y;
  int* expert;    // [visits]
  float* weight;  // [visits]
  T* inner;       // [visits,I]
  int* counts;    // [E]
  int* visits;    // [E,tokens]
  float* out;     // [visits,H]
  bool grouped, arranged;  // arranged: inner activations and rows of visits have another place (moe_many.cuh)
};

// A warp selects the experts of a token.
template <typename T, typename Matrix>
__global__ void route_kernel(Work<T, Matrix> work) {
  wait_for_previous();
  let_next_start();
  const int token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, E = work.moe.E, K = work.moe.K;
  if (token >= work.moe.tokens) return;
  constexpr int kUsual = 256;
  const T* logits = work.logits + size_t(token) * E;
  const Choice choice = E <= kUsual ? choose_experts<kUsual>(logits, E, K) : choose_experts<kMostExperts>(logits, E, K);
  if (lane < K) {
    const int visit = token * K + lane;
    work.expert[visit] = choice.expert;
    work.weight[visit] = choice.weight;
    if (work.grouped) {
      const int place = atomicAdd(&work.counts[choice.expert], 1);
      if (place < work.moe.tokens) work.visits[size_t(choice.expert) * work.moe.tokens + place] = visit;
    }
  }
}

__device__ inline uint4 no_values() { return make_uint4(0, 0, 0, 0); }

// 8 visits at most: `visit` is that of lane group g, -1 where there is none.
template <typename T, typename Stream>
__device__ void gate_up_tile(const Work<T, typename Stream::Matrix>& work, const Stream& stream, const typename Stream::Matrix& w, int visit, char* shared, int (&of)[kFewColumns]) {
  const int warp = threadIdx.x / 32, H = work.moe.H, I = work.moe.I, units = stream.units();
  const int count = warp >= units ? 0 : (units - warp + kMoeWarps - 1) / kMoeWarps;
  const auto panel = [&](int, int p) { return w.panel(blockIdx.x + p * (I / kPanelRows)); };
  const auto unit = [&](int u) { return warp + u * kMoeWarps; };
  const T* row = work.x + size_t(max(visit, 0) / work.moe.K) * H;
  stream.start(panel, unit, count);
  float sum[2][4] = {};
  stream.run(
      panel, unit, count, [&](int, int k) { return visit >= 0 && k < H ? *reinterpret_cast<const uint4*>(row + k) : no_values(); },
      [](int) { return 1.0f; }, sum);
  __syncthreads();
  float* partial = reinterpret_cast<float*>(shared);
  store_sums(sum, partial + warp * 256, stream.g, stream.t);
  __syncthreads();
  const int m = threadIdx.x / 16, r = threadIdx.x % 16;
  if (m < kFewColumns && of[m] >= 0) {
    float gate = 0.0f, up = 0.0f;
    for (int i = 0; i < kMoeWarps; i++) gate += partial[i * 256 + m * 16 + r], up += partial[i * 256 + 128 + m * 16 + r];
    work.inner[size_t(of[m]) * I + blockIdx.x * kPanelRows + r] = from_float<T>(silu(gate) * up);
  }
}

// Few tokens: block (panel, visit). The first visit of an expert does the work of all of them: a token visits it once, so they are 8 at most.
template <typename T, typename Stream>
__global__ void __launch_bounds__(kMoeWarps * 32) gate_up_few_kernel(Work<T, typename Stream::Matrix> work) {
  extern __shared__ __align__(16) char shared[];
  __shared__ int of[kFewColumns];
  wait_for_previous();
  let_next_start();
  const int own = blockIdx.y, e = work.expert[own], K = work.moe.K;
  if (threadIdx.x < kFewColumns) {
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
  const Stream stream(work.moe.gate_up, shared, threadIdx.x / 32);
  gate_up_tile<T, Stream>(work, stream, work.moe.gate_up.expert(e), of[stream.g], shared, of);
}

// Many: block (panel, expert).
template <typename T, typename Stream>
__global__ void __launch_bounds__(kMoeWarps * 32) gate_up_many_kernel(Work<T, typename Stream::Matrix> work) {
  extern __shared__ __align__(16) char shared[];
  __shared__ int of[kFewColumns];
  wait_for_previous();
  let_next_start();
  const int e = blockIdx.y, count = min(work.counts[e], work.moe.tokens);
  const Stream stream(work.moe.gate_up, shared, threadIdx.x / 32);
  for (int first = 0; first < count; first += kFewColumns) {
    __syncthreads();
    if (threadIdx.x < kFewColumns)
      of[threadIdx.x] = first + int(threadIdx.x) < count ? work.visits[size_t(e) * work.moe.tokens + first + threadIdx.x] : -1;
    __syncthreads();
    gate_up_tile<T, Stream>(work, stream, work.moe.gate_up.expert(e), of[stream.g], shared, of);
  }
}

// Few tokens: block (panel, token) adds up the token's experts, in their order.
template <typename T, typename Stream>
__global__ void __launch_bounds__(kMoeWarps * 32) down_few_kernel(Work<T, typename Stream::Matrix> work) {
  extern __shared__ __align__(16) char shared[];
  const auto& w = work.moe.down;
  const int token = blockIdx.y, warp = threadIdx.x / 32, H = work.moe.H, I = work.moe.I, K = work.moe.K;
  const Stream stream(w, shared, warp);
  const int units = stream.units(), all = units * K, count = warp >= all ? 0 : (all - warp + kMoeWarps - 1) / kMoeWarps;
  const auto visit = [&](int u) { return token * K + (warp + u * kMoeWarps) / units; };
  const auto panel = [&](int u, int) { return w.expert(work.expert[visit(u)]).panel(blockIdx.x); };
  const auto unit = [&](int u) { return (warp + u * kMoeWarps) % units; };
  // The experts were selected by the kernel before the previous one, which is complete.
  stream.start(panel, unit, count);
  wait_for_previous();
  let_next_start();
  float sum[1][4] = {};
  stream.run(
      panel, unit, count,
      [&](int u, int k) { return stream.g == 0 && k < I ? *reinterpret_cast<const uint4*>(work.inner + size_t(visit(u)) * I + k) : no_values(); },
      [&](int u) { return work.weight[visit(u)]; }, sum);
  __syncthreads();
  float* partial = reinterpret_cast<float*>(shared);
  store_sums(sum, partial + warp * 128, stream.g, stream.t);
  __syncthreads();
  const int column = blockIdx.x * kPanelRows + threadIdx.x;
  if (threadIdx.x >= kPanelRows || column >= H) return;
  float value = 0.0f;
  for (int i = 0; i < kMoeWarps; i++) value += partial[i * 128 + threadIdx.x];
  work.y[size_t(token) * H + column] = from_float<T>(value);
}

// Many: block (two panels, expert) writes the rows of its visits.
template <typename T, typename Stream>
__global__ void __launch_bounds__(kMoeWarps * 32) down_many_kernel(Work<T, typename Stream::Matrix> work) {
  extern __shared__ __align__(16) char shared[];
  wait_for_previous();
  let_next_start();
  const auto& w = work.moe.down;
  const int e = blockIdx.y, warp = threadIdx.x / 32, H = work.moe.H, I = work.moe.I, panels = w.panels(), found = min(work.counts[e], work.moe.tokens);
  const Stream stream(w, shared, warp);
  const int units = stream.units(), count = warp >= units ? 0 : (units - warp + kMoeWarps - 1) / kMoeWarps;
  const auto matrix = w.expert(e);
  const int* visits = work.visits + size_t(e) * work.moe.tokens;
  const auto panel = [&](int, int p) { return matrix.panel(min(2 * int(blockIdx.x) + p, panels - 1)); };
  const auto unit = [&](int u) { return warp + u * kMoeWarps; };
  float* partial = reinterpret_cast<float*>(shared);
  for (int first = 0; first < found; first += kFewColumns) {
    __syncthreads();
    stream.start(panel, unit, count);
    const T* row = first + stream.g < found ? work.inner + size_t(visits[first + stream.g]) * I : nullptr;
    float sum[2][4] = {};
    stream.run(
        panel, unit, count, [&](int, int k) { return row != nullptr && k < I ? *reinterpret_cast<const uint4*>(row + k) : no_values(); },
        [](int) { return 1.0f; }, sum);
    __syncthreads();
    store_sums(sum, partial + warp * 256, stream.g, stream.t);
    __syncthreads();
    const int m = threadIdx.x / 32, n = threadIdx.x % 32, column = blockIdx.x * 2 * kPanelRows + n;
    if (first + m < found && column < H) {
      float value = 0.0f;
      for (int i = 0; i < kMoeWarps; i++) value += partial[i * 256 + n / kPanelRows * 128 + m * kPanelRows + n % kPanelRows];
      work.out[size_t(visits[first + m]) * H + column] = value;
    }
  }
}

// y[token] = the weighed sum of its visits, in their order.
template <typename T, typename Matrix>
__global__ void combine_kernel(Work<T, Matrix> work) {
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

inline size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// The parts of the workspace; `base` null: only the size.
template <typename T, typename Matrix>
size_t place(Work<T, Matrix>& work, char* base) {
  const Experts<Matrix>& moe = work.moe;
  const size_t visits = size_t(moe.tokens) * moe.K;
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    char* here = base + at;
    at += aligned(bytes);
    return here;
  };
  work.expert = reinterpret_cast<int*>(take(visits * sizeof(int)));
  work.weight = reinterpret_cast<float*>(take(visits * sizeof(float)));
  if (work.grouped) {
    work.counts = reinterpret_cast<int*>(take(moe.E * sizeof(int)));
    work.visits = reinterpret_cast<int*>(take(size_t(moe.E) * moe.tokens * sizeof(int)));
  }
  if (!work.arranged) work.inner = reinterpret_cast<T*>(take(visits * moe.I * sizeof(T)));
  if (work.grouped && !work.arranged) work.out = reinterpret_cast<float*>(take(visits * moe.H * sizeof(float)));
  return at;
}

template <typename T, typename Matrix>
Work<T, Matrix> work_of(const Experts<Matrix>& moe, bool arranged = false) {
  Work<T, Matrix> work{moe};
  work.grouped = moe.tokens > kFewColumns || arranged, work.arranged = arranged;
  return work;
}

template <typename Stream, typename Kernel, typename W>
void start_experts(Kernel kernel, dim3 grid, cudaStream_t stream, const W& work) {
  constexpr size_t bytes = Stream::kBytesPerWarp * kMoeWarps;
  allow_shared(kernel, bytes);
  launch(kernel, grid, dim3(kMoeWarps * 32), bytes, stream, work);
}

template <typename T, template <typename, int> typename Stream, typename Matrix>
void gate_up(const Work<T, Matrix>& work, cudaStream_t stream) {
  using Two = Stream<T, 2>;
  const unsigned gates = work.moe.I / kPanelRows;
  if (work.grouped)
    start_experts<Two>(gate_up_many_kernel<T, Two>, dim3(gates, work.moe.E), stream, work);
  else
    start_experts<Two>(gate_up_few_kernel<T, Two>, dim3(gates, work.moe.tokens * work.moe.K), stream, work);
}

template <typename T, template <typename, int> typename Stream, typename Matrix>
void down(const Work<T, Matrix>& work, cudaStream_t stream) {
  using One = Stream<T, 1>;
  using Two = Stream<T, 2>;
  if (work.grouped)
    start_experts<Two>(down_many_kernel<T, Two>, dim3((work.moe.H + 2 * kPanelRows - 1) / (2 * kPanelRows), work.moe.E), stream, work);
  else
    start_experts<One>(down_few_kernel<T, One>, dim3(work.moe.down.panels(), work.moe.tokens), stream, work);
}

// Before gate_up and down: which experts each token visits, after which they may be launched.
template <typename T, typename Matrix>
Work<T, Matrix> routed(const Experts<Matrix>& moe, const T* x, const T* logits, T* y, void* workspace, cudaStream_t stream, bool arranged = false) {
  Work<T, Matrix> work = work_of<T>(moe, arranged);
  work.x = x, work.logits = logits, work.y = y;
  place(work, static_cast<char*>(workspace));
  if (work.grouped) check(cudaMemsetAsync(work.counts, 0, moe.E * sizeof(int), stream), "cudaMemsetAsync");
  launch(route_kernel<T, Matrix>, dim3((moe.tokens + 3) / 4), dim3(128), 0, stream, work);
  return work;
}

// After them: the visits of each token added up, where each has a row of its own.
template <typename T, typename Matrix>
void combine(const Work<T, Matrix>& work, cudaStream_t stream) {
  if (work.grouped) launch(combine_kernel<T, Matrix>, dim3((work.moe.H + 127) / 128, work.moe.tokens), dim3(128), 0, stream, work);
}

}  // namespace qwen
