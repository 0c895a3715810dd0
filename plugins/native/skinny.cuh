// Products of a few rows with a large weight: y[m,n] = sum_k x[m,k] w[n,k] for M <= 8, bound by reading w once.
#pragma once

#include <cuda_runtime.h>

namespace qwen {

constexpr int kSkinnyRows = 8;

// y = norm(x) w^T + residual.   x [M,K]  w [N,K]  residual, y [M,N]  norm [K]; residual and norm may be null.
// norm(x) = x / sqrt(mean(x^2) + eps) * norm, rounded to T. K and N are multiples of 8.
template <typename T>
void skinny_linear(const T* x, const T* w, const T* residual, const T* norm, float eps, T* y, int M, int N, int K, cudaStream_t stream);

// y = silu(h g^T) * (h u^T),  h = norm(x).   w = [g; u], [2N,K]  y [M,N]
template <typename T>
void skinny_swiglu(const T* x, const T* w, const T* norm, float eps, T* y, int M, int N, int K, cudaStream_t stream);

}  // namespace qwen
