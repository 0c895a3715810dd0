// Activations in the order in which fragments of packed weights meet them.
//
// A lane takes 8 neighboring k of a row of weights, 4 lanes 32 k (quant_stream.cuh), and a product of the tensor cores wants of a lane the k
// 2t, 2t+1, 2t+8, 2t+9 of 16. So within each 32 k of an activation row the pairs of all lanes that one register of a fragment takes lie together.
#pragma once

#include "device.cuh"
#include "panels.cuh"
#include "wgmma.cuh"

namespace qwen {

constexpr int kArrangeThreads = 128, kArrangedTogether = 4;  // eights of a row that a thread has at a time

// What a row of K has room for.
__host__ __device__ inline int arranged_stride(int K) { return (K + kUnit - 1) / kUnit * kUnit; }

// Where k of a row is, for weights of `bits`: 4-bit codes come in the pairs (0,2) (4,6) (1,3) (5,7) of a lane's 8, others in order.
__device__ inline int arranged_at(int k, int bits) {
  const int t = k / 8 % 4, i = k % 8;
  const int place = bits == 4 ? i % 2 * 2 + i / 4 : i / 2, half = bits == 4 ? i / 2 % 2 : i % 2;
  return k / kStep * kStep + place * 8 + t * 2 + half;
}

// The pairs of the 8 values of a lane, and what it has of 32 k in the order above: the lanes of four exchange them.
template <int BITS>
__device__ inline uint4 pairs_of(const uint4& x) {
  if constexpr (BITS != 4) return x;
  return make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410), __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632));
}
__device__ inline uint4 exchanged(const uint4& x) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? x.x : x.y, 1), b = __shfl_xor_sync(0xffffffffu, odd ? x.z : x.w, 1);
  const uint4 y = odd ? make_uint4(a, x.y, b, x.w) : make_uint4(x.x, a, x.z, b);  // of words in pairs
  const uint32_t c = __shfl_xor_sync(0xffffffffu, high ? y.x : y.z, 2), d = __shfl_xor_sync(0xffffffffu, high ? y.y : y.w, 2);
  return high ? make_uint4(c, d, y.z, y.w) : make_uint4(y.x, y.y, c, d);
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

// A block arranges a row of rms_norm(x), or kArrangeThreads * kArrangedTogether times eight values of a row of x.
template <typename T, int BITS, typename Order>
__global__ void __launch_bounds__(kArrangeThreads) arrange_kernel(const Arrangement given, const Order order) {
  __shared__ float sums[kArrangeThreads / 32];
  if (given.early) let_next_start();
  constexpr int kTogether = kArrangeThreads * kArrangedTogether;
  const int eights = arranged_stride(given.K) / 8, own = blockIdx.y * kTogether + threadIdx.x, all = gridDim.y * kTogether;
  const T* row = static_cast<const T*>(given.x) + size_t(blockIdx.x) * given.K;
  const T* norm = static_cast<const T*>(given.norm);
  const auto load = [&](const T* from, int first, Pack8<T> (&to)[kArrangedTogether]) {
#pragma unroll
    for (int i = 0; i < kArrangedTogether; i++) {
      const int at = (first + i * kArrangeThreads) * 8;
      to[i].bits = make_uint4(0, 0, 0, 0);
      if (at < given.K) to[i].bits = *reinterpret_cast<const uint4*>(from + at);
    }
  };
  Pack8<T> weights[kArrangedTogether], values[kArrangedTogether];
  if (norm != nullptr) load(norm, own, weights);
  wait_for_previous();
  if (!given.early) let_next_start();
  load(row, own, values);
  float scale = 1.0f;
  if (norm != nullptr) {
    float sum = 0.0f;
    const auto add = [&](const Pack8<T> (&from)[kArrangedTogether]) {
#pragma unroll
      for (int i = 0; i < kArrangedTogether * 8; i++) sum += to_float(from[i / 8].item[i % 8]) * to_float(from[i / 8].item[i % 8]);
    };
    add(values);
    for (int first = own + all; first < eights; first += all) {
      Pack8<T> more[kArrangedTogether];
      load(row, first, more);
      add(more);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kArrangeThreads / 32; i++) sum += sums[i];
    scale = rsqrtf(sum / given.K + given.eps);
  }
  for (int first = own; first - int(threadIdx.x) < eights; first += all) {
    if (first != own) {
      load(row, first, values);
      if (norm != nullptr) load(norm, first, weights);
    }
#pragma unroll
    for (int i = 0; i < kArrangedTogether; i++) {
      if (norm != nullptr) {
#pragma unroll
        for (int j = 0; j < 8; j++) values[i].item[j] = from_float<T>(to_float(values[i].item[j]) * scale * to_float(weights[i].item[j]));
      }
      const int eight = first + i * kArrangeThreads;
      const uint4 result = exchanged(pairs_of<BITS>(values[i].bits));
      if (eight < eights) *order.at(given.y, blockIdx.x, eight) = result;
    }
  }
}

// For weights of `bits`, M rows. Blocks are small enough for a place beside those of product_many.cuh, where they wait.
template <typename T, typename Order>
void arrange(int bits, const Arrangement& given, const Order& order, int M, cudaStream_t stream) {
  constexpr auto four = arrange_kernel<T, 4, Order>, eight = arrange_kernel<T, 8, Order>;
  static DeviceFlags allowed;
  allowed.once([] { allow_shared(four, 0), allow_shared(eight, 0); });
  const int together = kArrangeThreads * kArrangedTogether * 8, blocks = given.norm != nullptr ? 1 : (arranged_stride(given.K) + together - 1) / together;
  launch(bits == 4 ? four : eight, dim3(M, blocks), dim3(kArrangeThreads), 0, stream, given, order);
}

}  // namespace qwen
