// Rows normalized in front of a product that does not do it itself, with the bits of one that does (few_rows.cuh).
#pragma once

#include "few_rows.cuh"

namespace qwen {

constexpr int kNormalizeWarps = 16;

// A block for each row.
template <typename T>
__global__ void __launch_bounds__(kNormalizeWarps * 32) normalize_few_kernel(const T* x, const T* norm, float eps, T* y, int K) {
  extern __shared__ __align__(16) uint8_t shared[];
  const int chunks = K / kChunk;
  const size_t first = size_t(blockIdx.x) * K;
  const FewRows<T> row{x + first, reinterpret_cast<uint4*>(shared), 1, K, 0, chunks};
  const uint4 weight = row.first_weight(norm);
  wait_for_previous();
  let_next_start();
  row.stage(norm, weight, eps);
  for (int chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) *reinterpret_cast<uint4*>(y + first + chunk * kChunk) = row.staged[chunk];
}

// y = norm(x), [M,K], K a multiple of 8. False, and nothing done, where a row does not fit in shared memory.
template <typename T>
bool normalize_few(const T* x, const T* norm, float eps, T* y, int M, int K, cudaStream_t stream) {
  const size_t bytes = FewRows<T>::staged_bytes(K / kChunk, 0);
  if (bytes > 48 << 10) return false;
  launch(normalize_few_kernel<T>, dim3(M), dim3(kNormalizeWarps * 32), bytes, stream, x, norm, eps, y, K);
  return true;
}

}  // namespace qwen
