// What one warp does for few queries: a tile of 16 slots against up to 8 or 16 rows of queries, which are the columns of both products, with a
// running softmax. So no more is multiplied than 8 columns where there are few.
#pragma once

#include "attention_tile.cuh"

namespace qwen {

constexpr int kTileSlots = 16;

// An 8 x 8 matrix of 16-bit elements, as the tensor core has it, transposed.
__device__ inline uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(y) : "r"(x));
  return y;
}

// Lane 4g+t has columns 2t and 2t+1 of each eight.
template <typename T, int D, int EIGHTS>
struct ColumnTile {
  float o[D / 16][EIGHTS][4];  // values 16m+g (0, 1) and 16m+g+8 (2, 3) of columns 2t (0, 2) and 2t+1 (1, 3)
  float largest[EIGHTS][2], sum[EIGHTS][2];  // of the scores in base 2; `sum` is this lane's part until `finish`
  uint32_t q[D / 16][EIGHTS][2];

  // `queries` are rows of D elements, `stride` from one to the next.
  __device__ void begin(const T* queries, int stride, int lane) {
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(queries + (n * 8 + lane / 4) * stride + lane % 4 * 2);
#pragma unroll
      for (int step = 0; step < D / 16; step++) q[step][n][0] = words[step * 8], q[step][n][1] = words[step * 8 + 4];
      largest[n][0] = largest[n][1] = -INFINITY;
      sum[n][0] = sum[n][1] = 0.0f;
#pragma unroll
      for (int m = 0; m < D / 16; m++) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0.0f;
    }
  }

  // s = k q^T: slots g (0, 1) and g+8 (2, 3).
  __device__ void scores(float (&s)[EIGHTS][4], uint32_t keys, int lane) const {
    const int matrix = lane / 8, row = matrix % 2 * 8 + lane % 8;
    const uint32_t first = keys + row * D * 2 + ((matrix / 2 ^ exchange<D>(row)) << 4);
    float odd[EIGHTS][4];
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] = odd[n][i] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
      uint32_t k[4];
      load_matrices<false>(k, first ^ (step << 5));
      // Two chains of sums: a product need not wait for the one before.
#pragma unroll
      for (int n = 0; n < EIGHTS; n++) multiply<T>(step % 2 ? odd[n] : s[n], k[0], k[1], k[2], k[3], q[step][n][0], q[step][n][1]);
    }
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] += odd[n][i];
    }
  }

  // Scores become weights. Column 2t+i of an eight sees the first visible[.][i] slots of the tile. `scale` includes log2(e).
  __device__ void weigh(float (&s)[EIGHTS][4], const int (&visible)[EIGHTS][2], int first, bool all, float scale, int lane) {
    bool grows = false;
    float top[EIGHTS][2];
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (!all) {
          if (first + lane / 4 >= visible[n][i]) s[n][i] = -INFINITY;
          if (first + lane / 4 + 8 >= visible[n][i]) s[n][i + 2] = -INFINITY;
        }
        float most = fmaxf(s[n][i], s[n][i + 2]);
#pragma unroll
        for (int far = 4; far < 32; far *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, far));
        top[n][i] = fmaxf(largest[n][i], most * scale);
        grows |= top[n][i] > largest[n][i];
      }
    }
    if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
      for (int n = 0; n < EIGHTS; n++) {
        float keep[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          keep[i] = top[n][i] == -INFINITY ? 1.0f : power_of_two(largest[n][i] - top[n][i]);
          largest[n][i] = top[n][i], sum[n][i] *= keep[i];
        }
#pragma unroll
        for (int m = 0; m < D / 16; m++) o[m][n][0] *= keep[0], o[m][n][1] *= keep[1], o[m][n][2] *= keep[0], o[m][n][3] *= keep[1];
      }
    }
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float base = largest[n][i] == -INFINITY ? 0.0f : largest[n][i];
        s[n][i] = power_of_two(fmaf(s[n][i], scale, -base)), s[n][i + 2] = power_of_two(fmaf(s[n][i + 2], scale, -base));
        sum[n][i] += s[n][i] + s[n][i + 2];
      }
    }
  }

  // o += v^T s.
  __device__ void add_values(const float (&s)[EIGHTS][4], uint32_t values, int lane) {
    uint32_t p[EIGHTS][2];
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) p[n][0] = transposed(pair<T>(s[n][0], s[n][1])), p[n][1] = transposed(pair<T>(s[n][2], s[n][3]));
    const int matrix = lane / 8, row = matrix / 2 * 8 + lane % 8;
    const uint32_t first = values + row * D * 2 + ((matrix % 2 ^ exchange<D>(row)) << 4);
#pragma unroll
    for (int m = 0; m < D / 16; m++) {
      uint32_t v[4];
      load_matrices<true>(v, first ^ (m << 5));
#pragma unroll
      for (int n = 0; n < EIGHTS; n++) multiply<T>(o[m][n], v[0], v[1], v[2], v[3], p[n][0], p[n][1]);
    }
  }

  // The sums of the columns become whole.
  __device__ void finish() {
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int far = 4; far < 32; far *= 2) sum[n][i] += __shfl_xor_sync(0xffffffffu, sum[n][i], far);
      }
    }
  }
};

}  // namespace qwen
