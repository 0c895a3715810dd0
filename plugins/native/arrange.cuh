// Activations in the order in which fragments of packed weights meet them.
//
// A lane takes 8 neighboring k of a row of weights, 4 lanes 32 k (quant_stream.cuh), and a product of the tensor cores wants of a lane the k
// 2t, 2t+1, 2t+8, 2t+9 of 16. So within each 32 k of an activation row the pairs of all lanes that one register of a fragment takes lie together.
#pragma once

#include "device.cuh"
#include "panels.cuh"

namespace qwen {

constexpr int kArrangeThreads = 128;

// What a row of K has room for.
__host__ __device__ inline int arranged_stride(int K) { return (K + kUnit - 1) / kUnit * kUnit; }

// Where k of a row is, for weights of `bits`: 4-bit codes come in the pairs (0,2) (4,6) (1,3) (5,7) of a lane's 8, others in order.
__device__ inline int arranged_at(int k, int bits) {
  const int t = k / 8 % 4, i = k % 8;
  const int place = bits == 4 ? i % 2 * 2 + i / 4 : i / 2, half = bits == 4 ? i / 2 % 2 : i % 2;
  return k / kStep * kStep + place * 8 + t * 2 + half;
}

// 32 k of a row.
template <int BITS>
__device__ inline void arrange_step(const uint4 (&x)[4], uint4* y) {
  uint32_t words[16];
#pragma unroll
  for (int t = 0; t < 4; t++) {
    if constexpr (BITS == 4) {
      words[t] = __byte_perm(x[t].x, x[t].y, 0x5410), words[4 + t] = __byte_perm(x[t].z, x[t].w, 0x5410);
      words[8 + t] = __byte_perm(x[t].x, x[t].y, 0x7632), words[12 + t] = __byte_perm(x[t].z, x[t].w, 0x7632);
    } else {
      words[t] = x[t].x, words[4 + t] = x[t].y, words[8 + t] = x[t].z, words[12 + t] = x[t].w;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) y[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
}

// A block arranges a row: y [M,arranged_stride(K)] of x [M,K], zeros behind K. With a norm, of rms_norm(x), which is written to `plain` [M,K] too,
// if that is not null.
template <typename T, int BITS>
__global__ void __launch_bounds__(kArrangeThreads) arrange_kernel(const T* x, const T* norm, float eps, T* y, T* plain, int K) {
  __shared__ float sums[kArrangeThreads / 32];
  wait_for_previous();
  let_next_start();
  const int stride = arranged_stride(K);
  const T* row = x + size_t(blockIdx.x) * K;
  float scale = 1.0f;
  if (norm != nullptr) scale = inverse_rms(row, K, eps, sums);
  for (int k = threadIdx.x * kStep; k < stride; k += blockDim.x * kStep) {
    uint4 values[4];
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const int at = k + t * 8;
      Pack8<T> p;
      p.bits = make_uint4(0, 0, 0, 0);
      if (at < K) {
        p.bits = *reinterpret_cast<const uint4*>(row + at);
        if (norm != nullptr) {
          Pack8<T> weight;
          weight.bits = *reinterpret_cast<const uint4*>(norm + at);
#pragma unroll
          for (int i = 0; i < 8; i++) p.item[i] = from_float<T>(to_float(p.item[i]) * scale * to_float(weight.item[i]));
        }
        if (plain != nullptr) *reinterpret_cast<uint4*>(plain + size_t(blockIdx.x) * K + at) = p.bits;
      }
      values[t] = p.bits;
    }
    arrange_step<BITS>(values, reinterpret_cast<uint4*>(y + size_t(blockIdx.x) * stride + k));
  }
}

template <typename T>
void arrange(int bits, const T* x, const T* norm, float eps, T* y, T* plain, int M, int K, cudaStream_t stream) {
  launch(bits == 4 ? arrange_kernel<T, 4> : arrange_kernel<T, 8>, dim3(M), dim3(kArrangeThreads), 0, stream, x, norm, eps, y, plain, K);
}

}  // namespace qwen
