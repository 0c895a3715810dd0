// Element-wise companions of the large matrix products.
#pragma once

#include <cuda_runtime.h>

namespace qwen {

// y[m] = x[m] / sqrt(mean(x[m]^2) + eps) * norm.   x, y [M,K]  norm [K], K a multiple of 8
template <typename T>
void rms_norm(const T* x, const T* norm, float eps, T* y, int M, int K, cudaStream_t stream);

// y[m,i] = silu(h[m,i]) * h[m,N+i].   h [M,2N]  y [M,N], N a multiple of 8
template <typename T>
void gate(const T* h, T* y, int M, int N, cudaStream_t stream);

}  // namespace qwen
