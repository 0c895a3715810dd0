// Attention of many new tokens on compute capability 9.0: a block has 128 rows of one sequence and kv head, four warps for each 64 of them. The
// scores of the next tile are made before the values of this one are added, so that the tensor cores work while the weights are computed.
#pragma once

#include "attention.cuh"
#include "attention_cache.cuh"
#include "attention_tile.cuh"
#include "wgmma.cuh"
#include "wide_softmax.cuh"

namespace qwen {

constexpr int kWideRows = 128, kWideSlots = 64, kWideThreads = 256, kWideD = 256;
constexpr int kWideTile = kWideSlots * kWideD * 2, kWideShared = kWideRows * kWideD * 2 + 4 * kWideTile;

// ROWS rows of 256 elements, of which those at and behind `there` become zeros.
template <typename T, int ROWS>
__device__ inline void copy_swizzled(uint32_t shared, const T* source, int there) {
#pragma unroll
  for (int i = 0; i < ROWS * kWideD / 8 / kWideThreads; i++) {
    const int at = i * kWideThreads + int(threadIdx.x), row = at / (kWideD / 8), unit = at % (kWideD / 8);
    const bool real = row < there;
    copy_unit(shared + swizzled(row, unit, ROWS), source + (real ? row * kWideD + unit * 8 : 0), real);
  }
}

// The same of rows of bytes, whose values are made on the way.
template <typename T, typename Cache, int ROWS>
__device__ inline void expand_swizzled(uint32_t shared, const unsigned char* source, int there) {
  constexpr int kUnits = kWideD / 8, kTogether = 4;  // loads on their way: more would need more registers than the sums leave
#pragma unroll 1
  for (int first = threadIdx.x; first < ROWS * kUnits; first += kTogether * kWideThreads) {
    uint2 codes[kTogether];
    float factor[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
      const int at = first + i * kWideThreads, row = at / kUnits;
      const unsigned char* from = source + (row < there ? row : 0) * kCacheRow<Cache, kWideD>;
      codes[i] = __ldcg(reinterpret_cast<const uint2*>(from + at % kUnits * 8));
      factor[i] = Cache::loaded_factor(from, kWideD);
    }
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
      const int at = first + i * kWideThreads, row = at / kUnits;
      const uint4 x = row < there ? Cache::template values<T>(codes[i], factor[i]) : make_uint4(0, 0, 0, 0);
      asm volatile("st.shared.v4.b32 [%0],{%1,%2,%3,%4};" ::"r"(shared + swizzled(row, at % kUnits, ROWS)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                   : "memory");
    }
  }
}

template <typename T, typename Cache>
__global__ void __launch_bounds__(kWideThreads, 1)
    attention_wide(AttentionShape shape, AttentionTensors<T> in, const T* queries, int padded_rows, float scale) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char shared[];
  const int thread = threadIdx.x, lane = thread % 32, four = thread / 128, warp = thread / 32;
  const int G = shape.group(), Hkv = shape.Hkv, rows = shape.T * G, blocks = (rows + kWideRows - 1) / kWideRows, pairs = shape.B * Hkv;
  // Rows with the longest past first.
  const int rank = blockIdx.x, block = blocks - 1 - rank / pairs, b = rank % pairs / Hkv, h = rank % pairs % Hkv;
  wait_for_previous();
  let_next_start();

  const int length = length_of(shape, in, b);
  const int slots = visible_slots(block * kWideRows + kWideRows - 1, G, shape.T, length, 0), tiles = (slots + kWideSlots - 1) / kWideSlots;
  const size_t head = size_t(b) * Hkv + h;
  constexpr int kRow = kCacheRow<Cache, kWideD>;
  const unsigned char *keys = in.k_cache + head * shape.S * kRow, *values = in.v_cache + head * shape.S * kRow;
  const uint32_t at_q = shared_address(shared), at_k = at_q + kWideRows * kWideD * 2, at_v = at_k + 2 * kWideTile;
  auto copy_slots = [&](uint32_t to, const unsigned char* from, int i) {
    if (i >= tiles) return;
    to += i % 2 * kWideTile, from += size_t(i) * kWideSlots * kRow;
    if constexpr (Cache::kPlain) copy_swizzled<T, kWideSlots>(to, reinterpret_cast<const T*>(from), slots - i * kWideSlots);
    else expand_swizzled<T, Cache, kWideSlots>(to, from, slots - i * kWideSlots);
  };
  auto copy_keys = [&](int i) { copy_slots(at_k, keys, i); };
  auto copy_values = [&](int i) { copy_slots(at_v, values, i); };
  copy_swizzled<T, kWideRows>(at_q, queries + (head * padded_rows + block * kWideRows) * kWideD, kWideRows);
  copy_keys(0);
  end_copies();
  copy_keys(1);
  copy_values(0);
  end_copies();

  float o[128], s[32];
  WideSoftmax softmax;
  uint32_t p[16];
#pragma unroll
  for (int i = 0; i < 128; i++) o[i] = 0.0f;
  const int first_row = block * kWideRows + warp * kRowTile, row = first_row + lane / 4, column = lane % 4 * 2;
  const int visible[2] = {visible_slots(row, G, shape.T, length, 0), visible_slots(row + 8, G, shape.T, length, 0)};
  const int seen_by_all = visible_slots(first_row, G, shape.T, length, 0);

  auto scores = [&](int i) {
    const uint32_t k = at_k + i % 2 * kWideTile, q = at_q + four * 64 * 128;
#pragma unroll
    for (int step = 0; step < kWideD / 16; step++)
      product_64<T>(s, matrix_of(q + step / 4 * kWideRows * 128 + step % 4 * 32, 16), matrix_of(k + step / 4 * kWideSlots * 128 + step % 4 * 32, 16),
                    step > 0);
    end_products();
  };
  // s becomes weights; returns whether what was added before has to be scaled by `keep`.
  auto weigh = [&](int i) {
    if ((i + 1) * kWideSlots > seen_by_all) {
#pragma unroll
      for (int j = 0; j < 32; j++)
        if (i * kWideSlots + j / 4 * 8 + column + j % 2 >= visible[j % 4 / 2]) s[j] = -INFINITY;
    }
    return softmax.weigh(s, scale);
  };
  auto pack = [&] { pack_weights<T>(p, s); };

  wait_for_copies<1>();
  publish_to_products();
  __syncthreads();
  begin_products();
  scores(0);
  wait_for_products<0>();
  settle(s);
  weigh(0);
  pack();
  auto add_values = [&](int i) {
    const uint32_t v = at_v + i % 2 * kWideTile;
#pragma unroll
    for (int step = 0; step < kWideSlots / 16; step++)
      product_values<T>(o, p[step * 4], p[step * 4 + 1], p[step * 4 + 2], p[step * 4 + 3], matrix_of(v + step * 16 * 128, kWideSlots * 128));
    end_products();
  };
  for (int i = 0; i + 1 < tiles; i++) {
    wait_for_copies<0>();
    publish_to_products();
    __syncthreads();  // all have read what is overwritten now
    if constexpr (Cache::kPlain) {
      copy_keys(i + 2);
      copy_values(i + 1);
      end_copies();
    }
    begin_products();
    scores(i + 1);
    add_values(i);
    if constexpr (!Cache::kPlain) {  // values are made while the products are
      copy_keys(i + 2);
      copy_values(i + 1);
    }
    wait_for_products<1>();
    settle(s);
    const bool grows = weigh(i + 1);
    wait_for_products<0>();
    settle(o);
    settle(p);
    if (grows) {
#pragma unroll
      for (int j = 0; j < 128; j++) o[j] *= softmax.keep[j % 4 / 2];
    }
    pack();
  }
  wait_for_copies<0>();
  publish_to_products();
  __syncthreads();
  begin_products();
  add_values(tiles - 1);
  wait_for_products<0>();
  settle(o);

#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float sum = softmax.row_sum(half);
    if (row + half * 8 < rows) write_gated<T, kWideD>(shape, in, b, h, row + half * 8, lane, o, half, 1.0f / sum);
  }
#endif
}

}  // namespace qwen
