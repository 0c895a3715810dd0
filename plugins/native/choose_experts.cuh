// The choice of a token's experts, by one warp.
#pragma once

#include "device.cuh"
#include "moe.cuh"

namespace qwen {

// 16 bits of a float as an integer that grows with it, and back. Both zeros are one.
__device__ inline uint32_t ordered(uint32_t bits) { return (bits & 0x7FFF) == 0 ? 0x8000u : bits & 0x8000 ? ~bits & 0xFFFF : bits | 0x8000; }
__device__ inline uint32_t from_ordered(uint32_t key) { return key & 0x8000 ? key & 0x7FFF : ~key & 0xFFFF; }

// A key holds a logit and, below, what is larger for experts of lower numbers: no two are equal, and the largest of 32 is found in one instruction.
template <typename T, int PER_LANE>
__device__ inline uint32_t largest_keys(const T* logits, int E, int K) {
  const int lane = threadIdx.x % 32;
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(logits);
  uint32_t key[PER_LANE + 1], mine = 0;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    const int e = i * 32 + lane;
    key[i] = e < E ? ordered(bits[e]) << 16 | (0xFFFFu - e) : 0;
  }
  // A lane's own keys, the largest first.
#pragma unroll
  for (int size = 2; size <= PER_LANE; size *= 2) {
#pragma unroll
    for (int step = size / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < PER_LANE; i++) {
        const int other = i ^ step;
        if (other < i) continue;
        const uint32_t larger = max(key[i], key[other]), smaller = min(key[i], key[other]);
        key[i] = i & size ? smaller : larger, key[other] = i & size ? larger : smaller;
      }
    }
  }
  key[PER_LANE] = 0;
#pragma unroll 1
  for (int j = 0; j < K; j++) {
    const uint32_t best = __reduce_max_sync(0xffffffffu, key[0]);
    if (lane == j) mine = best;
    if (key[0] != best) continue;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) key[i] = key[i + 1];
  }
  return mine;
}

struct Choice {
  int expert;
  float weight;
};

// In lane j the expert of the j-th largest of E logits, j < K, of equal ones that of the lowest number first, and its share of the softmax over
// these K, in fp32. Other lanes: share 0. All 32 lanes must call it; K <= E <= MOST.
template <int MOST, typename T>
__device__ inline Choice choose_experts(const T* logits, int E, int K) {
  const int lane = threadIdx.x % 32;
  const uint32_t mine = largest_keys<T, MOST / 32>(logits, E, K);
  const uint16_t bits = uint16_t(from_ordered(mine >> 16));
  const float logit = lane < K ? to_float(*reinterpret_cast<const T*>(&bits)) : 0.0f;
  const float largest = __shfl_sync(0xffffffffu, logit, 0), share = lane < K ? __expf(logit - largest) : 0.0f;
  const float all = warp_sum(share);
  return {int(0xFFFFu - (mine & 0xFFFFu)), share / all};
}

}  // namespace qwen
