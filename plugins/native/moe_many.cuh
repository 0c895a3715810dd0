// The routed experts of many tokens on the tensor cores (product_many.cuh): the visits of an expert read its weights 64 at a time, and one launch for
// gate and up rows and one for down rows do the work of all experts.
#pragma once

#include "moe_kernels.cuh"
#include "product_many.cuh"

namespace qwen {

constexpr int kVisitsTogether = 64;  // visits

// What is there beside `Work`.
template <typename T>
struct ManyWork {
  T *x, *inner;  // arranged: [tokens,H], [visits,I]
  int2* tiles;   // as ManyProduct wants them
  int most;      // tiles that there can be
  size_t inner_bytes;
};

template <typename T>
size_t place_many(ManyWork<T>& many, const Experts<QuantMatrix>& moe, char* base) {
  const size_t visits = size_t(moe.tokens) * moe.K;
  many.most = int(visits / kVisitsTogether + (visits < size_t(moe.E) ? visits : moe.E));
  many.inner_bytes = visits * arranged_stride(moe.I) * sizeof(T);
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    char* here = base + at;
    at += aligned(bytes);
    return here;
  };
  many.x = reinterpret_cast<T*>(take(size_t(moe.tokens) * arranged_stride(moe.H) * sizeof(T)));
  many.inner = reinterpret_cast<T*>(take(many.inner_bytes));
  many.tiles = reinterpret_cast<int2*>(take((1 + size_t(many.most)) * sizeof(int2)));
  return at;
}

// One block, a thread for each expert.
static __global__ void __launch_bounds__(kMostExperts) plan_tiles_kernel(const int* counts, int E, int tokens, int2* tiles) {
  __shared__ int sums[32];
  wait_for_previous();
  let_next_start();
  const int e = threadIdx.x, warp = e / 32, lane = e % 32;
  const int own = e < E ? (min(counts[e], tokens) + kVisitsTogether - 1) / kVisitsTogether : 0;
  int before = own;  // with this one
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) sums[warp] = before;
  __syncthreads();
  for (int i = 0; i < warp; i++) before += sums[i];
  for (int i = 0; i < own; i++) tiles[1 + before - own + i] = make_int2(e, i * kVisitsTogether);
  if (e == kMostExperts - 1) tiles[0].x = before;
}

template <typename T, bool GENERAL, bool SWIGLU>
void run_experts_of(const ManyProduct& given, cudaStream_t stream) {
  if (given.w.bits == 4) return run_many<T, 4, GENERAL, kVisitsTogether, SWIGLU, true>(given, stream);
  run_many<T, 8, GENERAL, kVisitsTogether, SWIGLU, true>(given, stream);
}

template <typename T, bool SWIGLU>
void run_experts(const ManyProduct& given, cudaStream_t stream) {
  if constexpr (std::is_same<T, __half>::value) {
    if (!given.w.zeros && !given.w.wide_scales)
      return run_experts_of<T, false, SWIGLU>(given, stream);
  }
  run_experts_of<T, true, SWIGLU>(given, stream);
}

template <typename T>
void run_moe_many(const Experts<QuantMatrix>& moe, const T* x, const T* logits, T* y, void* workspace, cudaStream_t stream) {
  Work<T, QuantMatrix> size = work_of<T>(moe);
  ManyWork<T> many;
  place_many(many, moe, static_cast<char*>(workspace) + place(size, nullptr));
  // Between I and the next multiple of 128 nothing is written, and zeros are multiplied.
  if (arranged_stride(moe.I) != moe.I) check(cudaMemsetAsync(many.inner, 0, many.inner_bytes, stream), "cudaMemsetAsync");
  const auto work = routed(moe, x, logits, y, workspace, stream);
  launch(plan_tiles_kernel, dim3(1), dim3(kMostExperts), 0, stream, work.counts, moe.E, moe.tokens, many.tiles);
  arrange<T>(moe.gate_up.bits, x, nullptr, 0.0f, many.x, nullptr, moe.tokens, moe.H, stream);
  ManyProduct up{moe.gate_up, many.x, nullptr, many.inner, many.most, moe.I, arranged_stride(moe.I), 1};
  up.tiles = many.tiles, up.counts = work.counts, up.visits = work.visits, up.tokens = moe.tokens, up.sharing = moe.K, up.bits = moe.down.bits;
  run_experts<T, true>(up, stream);
  ManyProduct down{moe.down, many.inner, nullptr, work.out, many.most, moe.H, moe.H, 1};
  down.tiles = up.tiles, down.counts = up.counts, down.visits = up.visits, down.tokens = moe.tokens, down.sharing = 1;
  run_experts<T, false>(down, stream);
  combine(work, stream);
}

}  // namespace qwen
