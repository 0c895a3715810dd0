// What all kernels share: element types, 16-byte access, reductions, and launches that overlap with the kernel before them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "check.h"

namespace qwen {

template <typename T>
__device__ inline float to_float(T x) {
  return static_cast<float>(x);
}

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}

// Eight 16-bit elements.
template <typename T>
union Pack8 {
  uint4 bits;
  T item[8];
};

// Two.
template <typename T>
union Pack2 {
  uint32_t bits;
  T item[2];
};

__device__ inline float silu(float x) { return x / (1.0f + __expf(-x)); }

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// A kernel starts while the one before it in the stream still runs. It may touch weights, and state of earlier calls, before
// `wait_for_previous`; everything else only after. `let_next_start` comes after the wait: when the next kernel starts, all kernels before
// this one are complete. Only resident_few.cuh, product_many.cuh and what arranges for it let the next one start before they wait; a kernel behind such a
// product can rely on no kernel of its call but those before the last that kept the rule. Every call has such kernels (the embedding's gather is
// one), so state of earlier calls is safe.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launch `kernel` so that it may overlap with the previous one, where the device can (compute capability 9.0 and up).
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, Arguments... arguments) {
  static const bool overlap = [] {
    int device = 0, major = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    return major >= 9;
  }();
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "cudaLaunchKernelEx");
}

inline int multiprocessors() {
  static const int count = [] {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return value;
  }();
  return count;
}

// 1 / sqrt(mean(row^2) + eps) of a row of K values, a multiple of 8, in every thread of a block. `sums` is shared, a value per warp.
template <typename T>
__device__ inline float inverse_rms(const T* row, int K, float eps, float* sums) {
  float sum = 0.0f;
  for (int k = threadIdx.x * 8; k < K; k += blockDim.x * 8) {
    Pack8<T> p;
    p.bits = *reinterpret_cast<const uint4*>(row + k);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += to_float(p.item[i]) * to_float(p.item[i]);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0.0f);
  return rsqrtf(sum / K + eps);
}

}  // namespace qwen
