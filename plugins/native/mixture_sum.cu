#include "mixture_sum.cuh"

#include "device.cuh"

namespace qwen {
namespace {

// Eight columns of a row's three terms.
template <typename T>
struct Terms {
  Pack8<T> experts, shared, residual;

  __device__ void load(const T* from_experts, const T* from_shared, const T* from_residual, size_t at) {
    experts.bits = *reinterpret_cast<const uint4*>(from_experts + at);
    shared.bits = *reinterpret_cast<const uint4*>(from_shared + at);
    residual.bits = from_residual != nullptr ? *reinterpret_cast<const uint4*>(from_residual + at) : uint4{};  // zeros
  }

  __device__ void store(T* y, size_t at, float gate) const {
    Pack8<T> sum;
#pragma unroll
    for (int i = 0; i < 8; i++)
      sum.item[i] = from_float<T>(to_float(experts.item[i]) + gate * to_float(shared.item[i]) + to_float(residual.item[i]));
    *reinterpret_cast<uint4*>(y + at) = sum.bits;
  }
};

template <typename T>
__device__ inline float dot(const Pack8<T>& a, const Pack8<T>& b) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++) sum += to_float(a.item[i]) * to_float(b.item[i]);
  return sum;
}

// A block per row. Where a thread has one pack, and every published model is so, all loads of the row are on their way before the dot
// product waits for its own.
template <typename T>
__global__ void shared_expert_sum_kernel(const T* experts, const T* shared, const T* x, const T* gate, const T* residual, T* y, int H) {
  __shared__ float sums[32];
  const int first = threadIdx.x * 8, step = blockDim.x * 8;
  const size_t row = size_t(blockIdx.x) * H;
  Pack8<T> input, weight;
  Terms<T> terms;
  if (first < H) weight.bits = *reinterpret_cast<const uint4*>(gate + first);
  wait_for_previous();
  let_next_start();
  float sum = 0.0f;
  if (first < H) {
    input.bits = *reinterpret_cast<const uint4*>(x + row + first);
    terms.load(experts, shared, residual, row + first);
    sum = dot(input, weight);
  }
  for (int k = first + step; k < H; k += step) {
    input.bits = *reinterpret_cast<const uint4*>(x + row + k);
    weight.bits = *reinterpret_cast<const uint4*>(gate + k);
    sum += dot(input, weight);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0.0f);
  const float share = 1.0f / (1.0f + __expf(-sum));
  if (first < H) terms.store(y, row + first, share);
  for (int k = first + step; k < H; k += step) {
    terms.load(experts, shared, residual, row + k);
    terms.store(y, row + k, share);
  }
}

}  // namespace

template <typename T>
void shared_expert_sum(const T* experts, const T* shared, const T* x, const T* gate, const T* residual, T* y, int M, int H, cudaStream_t stream) {
  const int warps = (H / 8 + 31) / 32;  // of H alone, as is the order of the sum
  launch(shared_expert_sum_kernel<T>, dim3(M), dim3(32 * (warps < 32 ? warps : 32)), 0, stream, experts, shared, x, gate, residual, y, H);
}

#define INSTANTIATE(T) \
  template void shared_expert_sum<T>(const T*, const T*, const T*, const T*, const T*, T*, int, int, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
