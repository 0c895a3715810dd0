// Attention of many new tokens: a block has 64 rows of one sequence and kv head, and reads all that they see.
#pragma once

#include "attention.cuh"
#include "attention_cache.cuh"
#include "attention_tile.cuh"

namespace qwen {

// Rows of bytes become values in memory of their own, which comes first: tiles begin at multiples of a row.
template <typename Cache, int D, int SLOTS>
constexpr int kPromptStage = Cache::kPlain ? 0 : SLOTS * D * 2;
template <typename Cache, int D, int SLOTS, int RING>
constexpr int kPromptShared = kPromptStage<Cache, D, SLOTS> + RING * SLOTS * kCacheRow<Cache, D>;

constexpr int kPromptWarps = 4, kPromptRows = kPromptWarps * kRowTile;

// Rows with the longest past first. The first blocks of a grid go one to each processor and the next ones beside them, so the second go in the
// opposite order: those of one processor have as much to do as those of another.
__device__ inline int balanced(int block, int blocks, int processors) {
  const int second = min(2 * processors, blocks);
  return block < processors || block >= second ? block : second - 1 - (block - processors);
}

template <typename T, typename Cache, int D, int SLOTS, int RING>
__global__ void __launch_bounds__(kPromptWarps * 32, 2)
    attention_prompt(AttentionShape shape, AttentionTensors<T> in, const T* queries, int padded_rows, float scale, int processors) {
  constexpr int kThreads = kPromptWarps * 32, kRow = kCacheRow<Cache, D>, kHalfBytes = SLOTS * kRow, kStage = kPromptStage<Cache, D, SLOTS>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int G = shape.group(), Hkv = shape.Hkv, rows = shape.T * G, blocks = (rows + kPromptRows - 1) / kPromptRows;
  const int pairs = shape.B * Hkv, rank = balanced(blockIdx.x, gridDim.x, processors);
  const int block = blocks - 1 - rank / pairs, b = rank % pairs / Hkv, h = rank % pairs % Hkv;
  wait_for_previous();
  let_next_start();

  const int length = length_of(shape, in, b);
  const int slots = length + min((block * kPromptRows + kPromptRows - 1) / G, shape.T - 1) + 1, tiles = (slots + SLOTS - 1) / SLOTS;
  const size_t head = size_t(b) * Hkv + h;
  const unsigned char *keys = in.k_cache + head * shape.S * kRow, *values = in.v_cache + head * shape.S * kRow;
  const uint32_t stage = shared_address(shared), ring = stage + kStage;
  int next = 0, next_place = 0;
  auto copy_next = [&] {
    if (next < 2 * tiles) {
      const int first = next / 2 * SLOTS;
      const unsigned char* source = (next % 2 ? values : keys) + size_t(first) * kRow;
      copy_rows<T, Cache, D, SLOTS, kThreads>(ring + next_place * kHalfBytes, source, slots - first, thread);
      next++, next_place = next_place + 1 == RING ? 0 : next_place + 1;
    }
    end_copies();
  };
#pragma unroll
  for (int i = 0; i < RING - 1; i++) copy_next();

  RowTile<T, D, SLOTS> tile;
  const int first_row = block * kPromptRows + warp * kRowTile;
  tile.template begin<D>(queries + (head * padded_rows + min(first_row, padded_rows - kRowTile)) * D, lane);
  int visible[2];
#pragma unroll
  for (int half = 0; half < 2; half++) visible[half] = visible_slots(first_row + lane / 4 + half * 8, G, shape.T, length, 0);
  const int seen_by_all = visible_slots(first_row, G, shape.T, length, 0);
  int place = 0;
  auto step = [&](auto&& compute) {
    wait_for_copies<RING - 2>();
    __syncthreads();
    copy_next();
    if constexpr (Cache::kPlain) {
      compute(ring + place * kHalfBytes);
    } else {
      expand_tile<T, Cache, D, SLOTS, kThreads>(stage, shared + kStage + place * kHalfBytes, thread);
      __syncthreads();
      compute(stage);
    }
    place = place + 1 == RING ? 0 : place + 1;
  };
  for (int i = 0; i < tiles; i++) {
    float s[SLOTS / 8][4];
    step([&](uint32_t at) { tile.scores(s, at, lane); });
    const int seen[2] = {visible[0] - i * SLOTS, visible[1] - i * SLOTS};
    tile.weigh(s, seen, (i + 1) * SLOTS <= seen_by_all, scale, lane);
    step([&](uint32_t at) { tile.add_values(s, at, lane); });
  }
  wait_for_copies<0>();
  tile.finish();

#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = first_row + lane / 4 + half * 8;
    if (row < rows) write_gated<T, D>(shape, in, b, h, row, lane, tile.o, half, 1.0f / tile.sum[half]);
  }
}

}  // namespace qwen
