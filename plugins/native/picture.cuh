// What a block of the vision tower is made of besides its products.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace qwen {

// B slices of L patches; H heads of D values, D a multiple of 8 and 128 at most.
struct PictureShape {
  int B, L, H, D;
};

size_t picture_workspace(const PictureShape& s);

// y = softmax(rotate(q) rotate(k)^T / sqrt(D)) v of each head, q|k|v = qkv + bias.   qkv T[B,L,3*H*D], bias T[3*H*D] or null, cos and sin f32[L,D/2],
// y T[B,L,H*D]
template <typename T>
void picture_attention(const PictureShape& s, const T* qkv, const T* bias, const float* cos, const float* sin, T* y, void* workspace,
                       cudaStream_t stream);

// total = x + bias + residual; y = (total - mean) / sqrt(variance + eps) * weight + offset.   [M,K], the others [K]; K a multiple of 8, 4096 at most
template <typename T>
void residual_norm(const T* x, const T* bias, const T* residual, const T* weight, const T* offset, float eps, T* total, T* y, int M, int K,
                   cudaStream_t stream);

// y = gelu(x + bias), the form with tanh.   x, y [M,N], bias [N], N a multiple of 8
template <typename T>
void bias_gelu(const T* x, const T* bias, T* y, int M, int N, cudaStream_t stream);

}  // namespace qwen
