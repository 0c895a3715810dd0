// The routed experts of many tokens on the tensor cores (experts_many.cuh): the visits of an expert read its weights many at a time, and one launch for
// gate and up rows and one for down rows do the work of all experts.
#pragma once

#include "experts_many.cuh"
#include "moe_kernels.cuh"

namespace qwen {

constexpr int kVisits8 = 32;  // of a tile of 8-bit weights: of more visits too few units fit

// What is there beside `Work`.
template <typename T>
struct ManyWork {
  T *x, *inner;  // arranged: [tokens,H], [visits,I]
  T* out;        // [visits,H]
  int2* tiles;   // as ExpertProduct wants them
  int most;      // tiles that there can be
  size_t inner_bytes;
};

// `together`: the most visits that share the weights.
template <typename T>
size_t place_many(ManyWork<T>& many, const Experts<QuantMatrix>& moe, int together, char* base) {
  const size_t visits = size_t(moe.tokens) * moe.K;
  many.most = int(visits / together + (visits < size_t(moe.E) ? visits : moe.E));
  many.inner_bytes = visits * arranged_stride(moe.I) * sizeof(T);
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    char* here = base + at;
    at += aligned(bytes);
    return here;
  };
  many.x = reinterpret_cast<T*>(take(size_t(moe.tokens) * arranged_stride(moe.H) * sizeof(T)));
  many.inner = reinterpret_cast<T*>(take(many.inner_bytes));
  many.out = reinterpret_cast<T*>(take(visits * moe.H * sizeof(T)));
  many.tiles = reinterpret_cast<int2*>(take((1 + size_t(many.most)) * sizeof(int2)));
  return at;
}

// One block, a thread for each expert.
static __global__ void __launch_bounds__(kMostExperts) plan_tiles_kernel(const int* counts, int E, int tokens, int together, int2* tiles) {
  __shared__ int sums[32];
  wait_for_previous();
  let_next_start();
  const int e = threadIdx.x, warp = e / 32, lane = e % 32;
  const int own = e < E ? (min(counts[e], tokens) + together - 1) / together : 0;
  int before = own;  // with this one
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) sums[warp] = before;
  __syncthreads();
  for (int i = 0; i < warp; i++) before += sums[i];
  for (int i = 0; i < own; i++) tiles[1 + before - own + i] = make_int2(e, i * together);
  if (e == kMostExperts - 1) tiles[0].x = before;
}

// y[token] = the weighed sum of its visits, in their order; a thread has eight columns.
template <typename T>
__global__ void combine_many_kernel(const T* out, const float* weight, T* y, int H, int K) {
  wait_for_previous();
  let_next_start();
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 8, token = blockIdx.y;
  if (column >= H) return;
  float sum[8] = {};
  for (int j = 0; j < K; j++) {
    const size_t visit = size_t(token) * K + j;
    Pack8<T> p;
    p.bits = *reinterpret_cast<const uint4*>(out + visit * H + column);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += weight[visit] * to_float(p.item[i]);
  }
  Pack8<T> p;
#pragma unroll
  for (int i = 0; i < 8; i++) p.item[i] = from_float<T>(sum[i]);
  *reinterpret_cast<uint4*>(y + size_t(token) * H + column) = p.bits;
}

template <typename T, int COLUMNS, bool GENERAL, bool SWIGLU>
void run_experts_of(const ExpertProduct& given, cudaStream_t stream) {
  if constexpr (COLUMNS == kVisits8) {
    if (given.w.bits == 8) return run_experts_many<T, 8, GENERAL, COLUMNS, SWIGLU>(given, stream);
  }
  run_experts_many<T, 4, GENERAL, COLUMNS, SWIGLU>(given, stream);
}

template <typename T, int COLUMNS, bool SWIGLU>
void run_experts(const ExpertProduct& given, cudaStream_t stream) {
  if constexpr (std::is_same<T, __half>::value) {
    if (!given.w.zeros && !given.w.wide_scales) return run_experts_of<T, COLUMNS, false, SWIGLU>(given, stream);
  }
  run_experts_of<T, COLUMNS, true, SWIGLU>(given, stream);
}

template <typename T, int COLUMNS>
void run_moe_many(const Experts<QuantMatrix>& moe, const T* x, const T* logits, T* y, void* workspace, cudaStream_t stream) {
  Work<T, QuantMatrix> size = work_of<T>(moe, true);
  ManyWork<T> many;
  place_many(many, moe, COLUMNS, static_cast<char*>(workspace) + place(size, nullptr));
  // Between I and the next multiple of 128 nothing is written, and zeros are multiplied.
  if (arranged_stride(moe.I) != moe.I) check(cudaMemsetAsync(many.inner, 0, many.inner_bytes, stream), "cudaMemsetAsync");
  const auto work = routed(moe, x, logits, y, workspace, stream, true);
  launch(plan_tiles_kernel, dim3(1), dim3(kMostExperts), 0, stream, work.counts, moe.E, moe.tokens, COLUMNS, many.tiles);
  // Between the plan and the products: these read it before they wait.
  arrange<T>(moe.gate_up.bits, {x, nullptr, 0.0f, many.x, moe.H, false}, ArrangedRows{arranged_stride(moe.H)}, moe.tokens, stream);
  ExpertProduct up{moe.gate_up, many.x, many.inner, moe.I, arranged_stride(moe.I), 0, moe.K, moe.down.bits};
  up.tiles = many.tiles, up.counts = work.counts, up.visits = work.visits, up.tokens = moe.tokens;
  ExpertProduct down = up;
  down.w = moe.down, down.x = many.inner, down.y = many.out, down.N = down.stride = moe.H, down.sharing = 1;
  run_experts<T, COLUMNS, true>(up, stream);
  run_experts<T, COLUMNS, false>(down, stream);
  launch(combine_many_kernel<T>, dim3((moe.H / 8 + 127) / 128, moe.tokens), dim3(128), 0, stream, many.out, work.weight, y, moe.H, moe.K);
}

}  // namespace qwen
