// Attention of the vision tower: all patches of a slice see each other, with no mask. Queries, keys and values are laid out by heads first.
#pragma once

#include "attention_tile.cuh"
#include "device.cuh"
#include "picture.cuh"
#include "wgmma.cuh"
#include "wide_softmax.cuh"

namespace qwen {

// Four values of a row.
template <typename T>
struct alignas(8) Quarter {
  T item[4];
};

// qkv T[B,L,3*H*D] and its bias -> q, k, v [3,B,H,L,P] with the bias added and q, k turned; columns from D to P are zeros. cos, sin f32[L,D/2].
template <typename T>
__global__ void picture_prepare(PictureShape s, const T* qkv, const T* bias, const float* cos, const float* sin, T* rows, int P) {
  wait_for_previous();
  let_next_start();
  const int row = blockIdx.x, b = row / s.L, l = row % s.L, half = s.D / 2, units = s.D / 8;
  const Quarter<T> none{};
  for (int i = threadIdx.x; i < 3 * s.H * units; i += blockDim.x) {
    const int kind = i / (s.H * units), h = i / units % s.H, j = i % units * 4, column = (kind * s.H + h) * s.D + j;
    const T* source = qkv + size_t(row) * 3 * s.H * s.D + column;
    Quarter<T> first = *reinterpret_cast<const Quarter<T>*>(source), second = *reinterpret_cast<const Quarter<T>*>(source + half);
    Quarter<T> first_bias = none, second_bias = none;
    if (bias != nullptr) {
      first_bias = *reinterpret_cast<const Quarter<T>*>(bias + column);
      second_bias = *reinterpret_cast<const Quarter<T>*>(bias + column + half);
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const float x = to_float(first.item[n]) + to_float(first_bias.item[n]), y = to_float(second.item[n]) + to_float(second_bias.item[n]);
      const float c = kind < 2 ? cos[l * half + j + n] : 1.0f, z = kind < 2 ? sin[l * half + j + n] : 0.0f;
      first.item[n] = from_float<T>(x * c - y * z), second.item[n] = from_float<T>(y * c + x * z);
    }
    T* target = rows + ((size_t(kind * s.B + b) * s.H + h) * s.L + l) * P;
    *reinterpret_cast<Quarter<T>*>(target + j) = first;
    *reinterpret_cast<Quarter<T>*>(target + half + j) = second;
    if (j == 0) {
      for (int column = s.D; column < P; column += 4) *reinterpret_cast<Quarter<T>*>(target + column) = none;
    }
  }
}

// Where a row of y [B,L,H*D] begins.
template <typename T>
__device__ inline T* picture_output(const PictureShape& s, T* y, int head, int row) {
  return y + (size_t(head / s.H) * s.L + row) * s.H * s.D + head % s.H * s.D;
}

template <typename T>
__device__ inline void store_pair(T* target, float x, float y) {
  *reinterpret_cast<uint32_t*>(target) = pair<T>(x, y);
}

constexpr int kPictureWarps = 4, kPictureSlots = 64, kPictureRing = 4;
template <int P>
constexpr int kPictureShared = kPictureRing * kPictureSlots * P * 2;

// A block has 64 rows of one head, 16 for each warp.
template <typename T, int P>
__global__ void __launch_bounds__(kPictureWarps * 32, 2) picture_attention_tiles(PictureShape s, const T* rows, float scale, T* y) {
  constexpr int kThreads = kPictureWarps * 32, kHalfBytes = kPictureSlots * P * 2;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int thread = threadIdx.x, lane = thread % 32, head = blockIdx.y, first_row = (blockIdx.x * kPictureWarps + thread / 32) * kRowTile;
  wait_for_previous();
  let_next_start();
  const size_t kind = size_t(s.B) * s.H * s.L * P;
  const T *queries = rows + size_t(head) * s.L * P, *keys = queries + kind, *values = keys + kind;
  const uint32_t ring = shared_address(shared);
  const int tiles = (s.L + kPictureSlots - 1) / kPictureSlots;
  int next = 0, next_place = 0, place = 0;
  auto copy_next = [&] {
    if (next < 2 * tiles) {
      const int slot = next / 2 * kPictureSlots;
      copy_tile<T, P, kPictureSlots, kThreads>(ring + next_place * kHalfBytes, (next % 2 ? values : keys) + size_t(slot) * P, s.L - slot, thread);
      next++, next_place = next_place + 1 == kPictureRing ? 0 : next_place + 1;
    }
    end_copies();
  };
#pragma unroll
  for (int i = 0; i < kPictureRing - 1; i++) copy_next();
  RowTile<T, P, kPictureSlots> tile;
  // Rows behind the last are read as the last ones, and not written.
  tile.template begin<P>(queries + size_t(max(0, min(first_row, s.L - kRowTile))) * P, lane);
  auto step = [&](auto&& compute) {
    wait_for_copies<kPictureRing - 2>();
    __syncthreads();
    copy_next();
    compute(ring + place * kHalfBytes);
    place = place + 1 == kPictureRing ? 0 : place + 1;
  };
  for (int i = 0; i < tiles; i++) {
    float weights[kPictureSlots / 8][4];
    step([&](uint32_t at) { tile.scores(weights, at, lane); });
    const int left = s.L - i * kPictureSlots, seen[2] = {left, left};
    tile.weigh(weights, seen, left >= kPictureSlots, scale, lane);
    step([&](uint32_t at) { tile.add_values(weights, at, lane); });
  }
  wait_for_copies<0>();
  tile.finish();
  const int shown = max(0, min(first_row, s.L - kRowTile));
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = shown + lane / 4 + half * 8;
    if (first_row >= s.L || row >= s.L) continue;
    T* target = picture_output(s, y, head, row);
#pragma unroll
    for (int j = 0; j < P / 8; j++) {
      const int column = j * 8 + lane % 4 * 2;
      if (column < s.D) store_pair(target + column, tile.o[j * 4 + half * 2] / tile.sum[half], tile.o[j * 4 + half * 2 + 1] / tile.sum[half]);
    }
  }
}

// Compute capability 9.0: a block has 64 rows for each four of its warps. The scores of the next tile are made before the values of this one
// are added, so that the tensor cores work while weights are computed. P = 16 * STEPS.
template <int STEPS, int FOURS>
struct PictureWide {
  static constexpr int kBlocks = (STEPS + 3) / 4, kRows = FOURS * 64, kThreads = FOURS * 128, P = STEPS * 16;
  static constexpr int kTile = kPictureSlots * kBlocks * 128, kShared = kRows * kBlocks * 128 + 4 * kTile;
};

// COUNT rows of P values, of which those at and behind `there` become zeros.
template <typename T, int COUNT, int STEPS, int THREADS>
__device__ inline void copy_picture_rows(uint32_t shared, const T* source, int there) {
  constexpr int kUnits = STEPS * 2;
#pragma unroll
  for (int i = 0; i < (COUNT * kUnits + THREADS - 1) / THREADS; i++) {
    const int at = i * THREADS + int(threadIdx.x), row = at / kUnits, unit = at % kUnits;
    if (COUNT * kUnits % THREADS != 0 && at >= COUNT * kUnits) break;
    const bool real = row < there;
    copy_unit(shared + swizzled(row, unit, COUNT), source + (real ? size_t(row) * STEPS * 16 + unit * 8 : 0), real);
  }
}

template <typename T, int STEPS, int FOURS>
__global__ void __launch_bounds__(FOURS * 128, 1) picture_attention_wide(PictureShape s, const T* rows, float scale, T* y) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Wide = PictureWide<STEPS, FOURS>;
  constexpr int kBlocks = Wide::kBlocks, kRows = Wide::kRows, kThreads = Wide::kThreads, kTile = Wide::kTile, P = Wide::P;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int lane = threadIdx.x % 32, four = threadIdx.x / 128, warp = threadIdx.x / 32, head = blockIdx.y, first = blockIdx.x * kRows;
  wait_for_previous();
  let_next_start();
  const size_t kind = size_t(s.B) * s.H * s.L * P;
  const T *queries = rows + (size_t(head) * s.L + first) * P, *keys = rows + kind + size_t(head) * s.L * P, *values = keys + kind;
  const int tiles = (s.L + kPictureSlots - 1) / kPictureSlots;
  const uint32_t at_q = shared_address(shared), at_k = at_q + kRows * kBlocks * 128, at_v = at_k + 2 * kTile;
  auto copy = [&](uint32_t to, const T* from, int i) {
    if (i < tiles)
      copy_picture_rows<T, kPictureSlots, STEPS, kThreads>(to + i % 2 * kTile, from + size_t(i) * kPictureSlots * P, s.L - i * kPictureSlots);
  };
  copy_picture_rows<T, kRows, STEPS, kThreads>(at_q, queries, s.L - first);
  copy(at_k, keys, 0);
  end_copies();
  copy(at_k, keys, 1);
  copy(at_v, values, 0);
  end_copies();

  float o[32 * kBlocks], w[32];
  WideSoftmax softmax;
  uint32_t p[16];
#pragma unroll
  for (int i = 0; i < 32 * kBlocks; i++) o[i] = 0.0f;
  const int row = first + warp * kRowTile + lane / 4, column = lane % 4 * 2;

  auto scores = [&](int i) {
    const uint32_t k = at_k + i % 2 * kTile, q = at_q + four * 64 * 128;
#pragma unroll
    for (int step = 0; step < STEPS; step++)
      product_64<T>(w, matrix_of(q + step / 4 * kRows * 128 + step % 4 * 32, 16), matrix_of(k + step / 4 * kPictureSlots * 128 + step % 4 * 32, 16),
                    step > 0);
    end_products();
  };
  // w becomes weights; returns whether what was added before has to be scaled by `keep`.
  auto weigh = [&](int i) {
    const int left = s.L - i * kPictureSlots;
    if (left < kPictureSlots) {
#pragma unroll
      for (int j = 0; j < 32; j++)
        if (j / 4 * 8 + column + j % 2 >= left) w[j] = -INFINITY;
    }
    return softmax.weigh(w, scale);
  };
  auto pack = [&] { pack_weights<T>(p, w); };
  auto add_values = [&](int i) {
    const uint32_t v = at_v + i % 2 * kTile;
#pragma unroll
    for (int step = 0; step < kPictureSlots / 16; step++)
      product_values<T>(o, p[step * 4], p[step * 4 + 1], p[step * 4 + 2], p[step * 4 + 3], matrix_of(v + step * 16 * 128, kPictureSlots * 128));
    end_products();
  };

  wait_for_copies<1>();
  publish_to_products();
  __syncthreads();
  begin_products();
  scores(0);
  wait_for_products<0>();
  settle(w);
  weigh(0);
  pack();
  for (int i = 0; i + 1 < tiles; i++) {
    wait_for_copies<0>();
    publish_to_products();
    __syncthreads();  // all have read what is overwritten now
    copy(at_k, keys, i + 2);
    copy(at_v, values, i + 1);
    end_copies();
    begin_products();
    scores(i + 1);
    add_values(i);
    wait_for_products<1>();
    settle(w);
    const bool grows = weigh(i + 1);
    wait_for_products<0>();
    settle(o);
    settle(p);
    if (grows) {
#pragma unroll
      for (int j = 0; j < 32 * kBlocks; j++) o[j] *= softmax.keep[j % 4 / 2];
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
    if (row + half * 8 >= s.L) continue;
    T* target = picture_output(s, y, head, row + half * 8);
    const float share = 1.0f / sum;
#pragma unroll
    for (int j = 0; j < 8 * kBlocks; j++) {
      if (j * 8 + column < s.D) store_pair(target + j * 8 + column, o[j * 4 + half * 2] * share, o[j * 4 + half * 2 + 1] * share);
    }
  }
#endif
}

}  // namespace qwen
