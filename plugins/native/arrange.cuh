// Activations in the order in which fragments of packed weights meet them.
//
// A lane takes 8 neighboring k of a row of weights, 4 lanes 32 k (quant_stream.cuh), and a product of the tensor cores wants of a lane the k
// 2t, 2t+1, 2t+8, 2t+9 of 16. So within each 32 k of an activation row the pairs of all lanes that one register of a fragment takes lie together.
#pragma once

#include <algorithm>

#include "device.cuh"
#include "panels.cuh"
#include "wgmma.cuh"

namespace qwen {

constexpr int kMostArrangeThreads = 512;

// What a row of K has room for.
__host__ __device__ inline int arranged_stride(int K) { return (K + kUnit - 1) / kUnit * kUnit; }

// Where k of a row is, for weights of `bits`: 4-bit codes come in the pairs (0,2) (4,6) (1,3) (5,7) of a lane's 8, others in order.
__device__ inline int arranged_at(int k, int bits) {
  const int t = k / 8 % 4, i = k % 8;
  const int place = bits == 4 ? i % 2 * 2 + i / 4 : i / 2, half = bits == 4 ? i / 2 % 2 : i % 2;
  return k / kStep * kStep + place * 8 + t * 2 + half;
}

// The four pairs of a lane's 8 values.
template <int BITS>
__device__ inline uint4 pairs_of(const uint4& x) {
  if constexpr (BITS != 4) return x;
  return make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410), __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632));
}

// Where eight neighboring values of a row go.
struct ArrangedRows {  // row after row, [M,arranged_stride(K)]
  int stride;
  __device__ uint4* at(void* y, int row, int eight) const { return static_cast<uint4*>(y) + (size_t(row) * stride / 8 + eight); }
};
struct ArrangedBlocks {  // as products read shared memory (wgmma.cuh), blocks of 64 k one after the other, [arranged_stride(K) / 64][rows][64]
  int rows;              // a multiple of 8
  __device__ uint4* at(void* y, int row, int eight) const { return static_cast<uint4*>(y) + swizzled(row, eight, rows) / 16; }
};

struct Arrangement {
  const void *x, *norm;  // x [M,K]; norm [K], or null
  float eps;
  void* y;     // zeros behind K
  int K;
  bool early;  // whether the next kernel may start at once: one that touches nothing but weights before it waits
};

// A block arranges a row of x, or of rms_norm(x).
template <typename T, int BITS, typename Order>
__global__ void __launch_bounds__(kMostArrangeThreads) arrange_kernel(const Arrangement given, const Order order) {
  __shared__ float sums[kMostArrangeThreads / 32];
  if (given.early) let_next_start();
  const int steps = arranged_stride(given.K) / kStep, own = threadIdx.x;
  const T* row = static_cast<const T*>(given.x) + size_t(blockIdx.x) * given.K;
  const T* norm = static_cast<const T*>(given.norm);
  const auto load = [&](const T* from, int step, Pack8<T> (&to)[4]) {
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const int at = step * kStep + t * 8;
      to[t].bits = make_uint4(0, 0, 0, 0);
      if (at < given.K) to[t].bits = *reinterpret_cast<const uint4*>(from + at);
    }
  };
  Pack8<T> weights[4], values[4];
  if (norm != nullptr) load(norm, own, weights);
  wait_for_previous();
  if (!given.early) let_next_start();
  load(row, own, values);
  float scale = 1.0f;
  if (norm != nullptr) {
    float sum = 0.0f;
    const auto add = [&](const Pack8<T> (&from)[4]) {
#pragma unroll
      for (int t = 0; t < 4; t++) {
#pragma unroll
        for (int i = 0; i < 8; i++) sum += to_float(from[t].item[i]) * to_float(from[t].item[i]);
      }
    };
    add(values);
    for (int step = own + blockDim.x; step < steps; step += blockDim.x) {
      Pack8<T> more[4];
      load(row, step, more);
      add(more);
    }
    sum = warp_sum(sum);
    if (own % 32 == 0) sums[own / 32] = sum;
    __syncthreads();
    sum = warp_sum(own % 32 < blockDim.x / 32 ? sums[own % 32] : 0.0f);
    scale = rsqrtf(sum / given.K + given.eps);
  }
  for (int step = own; step < steps; step += blockDim.x) {
    if (step != own) {
      load(row, step, values);
      if (norm != nullptr) load(norm, step, weights);
    }
    uint4 pairs[4];
#pragma unroll
    for (int t = 0; t < 4; t++) {
      if (norm != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; i++) values[t].item[i] = from_float<T>(to_float(values[t].item[i]) * scale * to_float(weights[t].item[i]));
      }
      pairs[t] = pairs_of<BITS>(values[t].bits);
    }
    *order.at(given.y, blockIdx.x, step * 4) = make_uint4(pairs[0].x, pairs[1].x, pairs[2].x, pairs[3].x);
    *order.at(given.y, blockIdx.x, step * 4 + 1) = make_uint4(pairs[0].y, pairs[1].y, pairs[2].y, pairs[3].y);
    *order.at(given.y, blockIdx.x, step * 4 + 2) = make_uint4(pairs[0].z, pairs[1].z, pairs[2].z, pairs[3].z);
    *order.at(given.y, blockIdx.x, step * 4 + 3) = make_uint4(pairs[0].w, pairs[1].w, pairs[2].w, pairs[3].w);
  }
}

// For weights of `bits`, M rows.
template <typename T, typename Order>
void arrange(int bits, const Arrangement& given, const Order& order, int M, cudaStream_t stream) {
  const int threads = std::min(kMostArrangeThreads, (arranged_stride(given.K) / kStep + 31) / 32 * 32);
  launch(bits == 4 ? arrange_kernel<T, 4, Order> : arrange_kernel<T, 8, Order>, dim3(M), dim3(threads), 0, stream, given, order);
}

}  // namespace qwen
