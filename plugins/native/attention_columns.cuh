// What one warp does for few queries: a tile of 16 or 32 slots against up to 8 rows of queries, which are the columns of both products, with a
// running softmax. So no more is multiplied than 8 columns.
#pragma once

#include "attention_tile.cuh"

namespace qwen {

// An 8 x 8 matrix of 16-bit elements, as the tensor core has it, transposed.
__device__ inline uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(y) : "r"(x));
  return y;
}

// Lane 4g+t has columns 2t and 2t+1. Where it adds up one of PARTS parts of the values, those are the first of `o`.
template <typename T, int D, int SLOTS>
struct ColumnTile {
  static constexpr int kBlocks = SLOTS / 16;       // of slots, as the tensor core has them
  static constexpr int kMostAhead = kBlocks == 1 ? 6 : 4;  // matrices on their way
  float o[D / 16][4];         // values 16m+g (0, 1) and 16m+g+8 (2, 3) of columns 2t (0, 2) and 2t+1 (1, 3)
  float largest[2], sum[2];   // of the scores in base 2; `sum` is this lane's part until `finish`
  uint32_t q[D / 16][2];

  // `queries` are rows of D elements, `stride` from one to the next.
  __device__ void begin(const T* queries, int stride, int lane) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(queries + lane / 4 * stride + lane % 4 * 2);
#pragma unroll
    for (int step = 0; step < D / 16; step++) q[step][0] = words[step * 8], q[step][1] = words[step * 8 + 4];
    largest[0] = largest[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int m = 0; m < D / 16; m++) o[m][0] = o[m][1] = o[m][2] = o[m][3] = 0.0f;
  }

  // s = k q^T of some blocks: of block n slots 16n+g (0, 1) and 16n+g+8 (2, 3).
  template <int BLOCKS>
  __device__ void scores(float (&s)[BLOCKS][4], uint32_t keys, int lane) const {
    constexpr int kMatrices = D / 16 * BLOCKS, kAhead = kMatrices < kMostAhead ? kMatrices : kMostAhead;
    const int matrix = lane / 8, row = matrix % 2 * 8 + lane % 8;
    const uint32_t first = keys + row * D * 2 + ((matrix / 2 ^ exchange<D>(row)) << 4);
    auto address = [&](int i) { return (first ^ (i / BLOCKS << 5)) + i % BLOCKS * 16 * D * 2; };
    float odd[BLOCKS][4];
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] = odd[n][i] = 0.0f;
    }
    uint32_t k[kAhead][4];
#pragma unroll
    for (int i = 0; i < kAhead; i++) load_matrices<false>(k[i], address(i));
#pragma unroll
    for (int i = 0; i < kMatrices; i++) {
      uint32_t(&now)[4] = k[i % kAhead];
      const int step = i / BLOCKS, n = i % BLOCKS;
      // Two chains of sums: a product need not wait for the one before.
      multiply<T>(step % 2 ? odd[n] : s[n], now[0], now[1], now[2], now[3], q[step][0], q[step][1]);
      if (i + kAhead < kMatrices) load_matrices<false>(now, address(i + kAhead));
    }
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] += odd[n][i];
    }
  }

  // Scores become weights. Column 2t+i sees the first visible[i] slots of the tile. `scale` includes log2(e).
  __device__ void weigh(float (&s)[kBlocks][4], const int (&visible)[2], int first, bool all, float scale, int lane) {
    bool grows = false;
    float top[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float most = -INFINITY;
#pragma unroll
      for (int n = 0; n < kBlocks; n++) {
        if (!all) {
          if (first + n * 16 + lane / 4 >= visible[i]) s[n][i] = -INFINITY;
          if (first + n * 16 + lane / 4 + 8 >= visible[i]) s[n][i + 2] = -INFINITY;
        }
        most = fmaxf(most, fmaxf(s[n][i], s[n][i + 2]));
      }
#pragma unroll
      for (int far = 4; far < 32; far *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, far));
      top[i] = fmaxf(largest[i], most * scale);
      grows |= top[i] > largest[i];
    }
    if (__any_sync(0xffffffffu, grows)) {
      float keep[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        keep[i] = top[i] == -INFINITY ? 1.0f : power_of_two(largest[i] - top[i]);
        largest[i] = top[i], sum[i] *= keep[i];
      }
#pragma unroll
      for (int m = 0; m < D / 16; m++) o[m][0] *= keep[0], o[m][1] *= keep[1], o[m][2] *= keep[0], o[m][3] *= keep[1];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float base = largest[i] == -INFINITY ? 0.0f : largest[i];
#pragma unroll
      for (int n = 0; n < kBlocks; n++) {
        s[n][i] = power_of_two(fmaf(s[n][i], scale, -base)), s[n][i + 2] = power_of_two(fmaf(s[n][i + 2], scale, -base));
        sum[i] += s[n][i] + s[n][i + 2];
      }
    }
  }

  // o += v^T s, of the part's values.
  template <int PARTS>
  __device__ void add_values(const float (&s)[kBlocks][4], uint32_t values, int part, int lane) {
    constexpr int kValues = D / 16 / PARTS, kMatrices = kValues * kBlocks, kAhead = kMatrices < kMostAhead ? kMatrices : kMostAhead;
    uint32_t p[kBlocks][2];
#pragma unroll
    for (int n = 0; n < kBlocks; n++) p[n][0] = transposed(pair<T>(s[n][0], s[n][1])), p[n][1] = transposed(pair<T>(s[n][2], s[n][3]));
    const int matrix = lane / 8, row = matrix / 2 * 8 + lane % 8;
    const uint32_t first = (values + row * D * 2 + ((matrix % 2 ^ exchange<D>(row)) << 4)) ^ (part * kValues << 5);
    auto address = [&](int i) { return (first ^ (i % kValues << 5)) + i / kValues * 16 * D * 2; };
    uint32_t v[kAhead][4];
#pragma unroll
    for (int i = 0; i < kAhead; i++) load_matrices<true>(v[i], address(i));
#pragma unroll
    for (int i = 0; i < kMatrices; i++) {
      uint32_t(&now)[4] = v[i % kAhead];
      const int m = i % kValues, n = i / kValues;
      multiply<T>(o[m], now[0], now[1], now[2], now[3], p[n][0], p[n][1]);
      if (i + kAhead < kMatrices) load_matrices<true>(now, address(i + kAhead));
    }
  }

  // The sums of the columns become whole.
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int far = 4; far < 32; far *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], far);
    }
  }
};

}  // namespace qwen
