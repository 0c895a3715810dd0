// What the kernels on panels of 16 weight rows share, whatever the codes are: copies that overlap with the work, units of work, and partial sums.
#pragma once

#include "device.cuh"
#include "panel_rows.cuh"

namespace qwen {

constexpr int kUnit = 128;  // k that a warp multiplies at a time
constexpr int kStep = 32;   // k that one load of 8 values per lane covers: 4 lanes times 8

__device__ inline void copy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(global) : "memory");
}
// Zeros where not `there`; `global` must be an address all the same.
__device__ inline void copy16_or_zeros(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(global), "r"(there ? 16 : 0)
               : "memory");
}
__device__ inline void copy4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(global) : "memory");
}
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ inline void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// A warp's sums into partial [PANELS][8][16] floats: value of activation row m and panel row r at p * 128 + m * 16 + r. sum[p][0], [1]: row
// 2g of the panel with activation rows 2t, 2t+1; [2], [3]: row 2g+1.
template <int PANELS>
__device__ inline void store_sums(const float (&sum)[PANELS][4], float* partial, int g, int t) {
#pragma unroll
  for (int p = 0; p < PANELS; p++) {
#pragma unroll
    for (int i = 0; i < 4; i++) partial[p * 128 + (2 * t + i % 2) * kPanelRows + 2 * g + i / 2] = sum[p][i];
  }
}

// `kernel` may use as much shared memory as the launch requests. All kernels of this kind need the largest share of the first-level cache as
// shared memory: a multiprocessor changes that only when it is idle.
template <typename Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes > 48 << 10) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), "cudaFuncSetAttribute");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared), "cudaFuncSetAttribute");
}

}  // namespace qwen
