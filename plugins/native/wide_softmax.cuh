// The running softmax of four warps on compute capability 9.0: a thread has 32 scores of 64 rows and 64 slots, of row lane / 4 of its warp's 16
// and of the row 8 further down, as the products leave them.
#pragma once

#include "attention_tile.cuh"

namespace qwen {

struct WideSoftmax {
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, keep[2] = {1.0f, 1.0f};

  // Scores become weights; returns whether what was added before has to be scaled by `keep`. Every row sees slot 0. `scale` includes log2(e).
  __device__ bool weigh(float (&s)[32], float scale) {
    float top[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float most = -INFINITY;
#pragma unroll
      for (int j = 0; j < 8; j++) most = fmaxf(most, fmaxf(s[j * 4 + half * 2], s[j * 4 + half * 2 + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      top[half] = fmaxf(largest[half], most * scale);
    }
    const bool grows = __any_sync(0xffffffffu, top[0] > largest[0] || top[1] > largest[1]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      keep[half] = power_of_two(largest[half] - top[half]);
      largest[half] = top[half], sum[half] *= keep[half];
#pragma unroll
      for (int j = 0; j < 8; j++) {
        float &x = s[j * 4 + half * 2], &y = s[j * 4 + half * 2 + 1];
        x = power_of_two(fmaf(x, scale, -top[half])), y = power_of_two(fmaf(y, scale, -top[half]));
        sum[half] += x + y;
      }
    }
    return grows;
  }

  // The sum of a whole row, when all slots were weighed.
  __device__ float row_sum(int half) const {
    float all = sum[half];
    all += __shfl_xor_sync(0xffffffffu, all, 1);
    return all + __shfl_xor_sync(0xffffffffu, all, 2);
  }
};

// Weights as the products take them.
template <typename T>
__device__ inline void pack_weights(uint32_t (&p)[16], const float (&s)[32]) {
#pragma unroll
  for (int i = 0; i < 16; i++) p[i] = pair<T>(s[i * 2], s[i * 2 + 1]);
}

}  // namespace qwen
