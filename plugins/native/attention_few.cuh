// Attention of a few new tokens over a long past, which is the time of reading the past: the slots of a sequence are cut into chunks, each
// read by one block, and the block that finishes the last chunk of a sequence and head adds them up.
//
// The grid does not depend on lengths, which are data: a recorded CUDA graph serves all of them. Where a sequence is cut depends on its own
// length alone, and chunks are added in their order, so its results do not depend on the others.
//
// A block has four warps that read (copies to shared memory, many on their way, and the products) and four that make the rows of the next
// chunk's queries in the meantime and add up what is complete.
#pragma once

#include "attention_columns.cuh"
#include "attention_few_plan.cuh"
#include "attention_rows.cuh"

namespace qwen {

template <typename T, typename Cache, int D, int EIGHTS, int MW, int READERS, int HALVES, int MAKERS>
__device__ __forceinline__ void few_tokens_of_block(const AttentionShape& shape, AttentionTensors<T> in, const FewPlan& plan, const FewWorkspace& work,
                                                    int first_sequence, int sequences) {
  using Layout = FewLayout<Cache, D, EIGHTS, MW, READERS, HALVES, MAKERS>;
  constexpr bool kFresh = Layout::kFresh;
  constexpr int kGroups = Layout::kGroups, kRows = Layout::kRows, kThreads = Layout::kThreads;
  constexpr int kWarpRows = Layout::kWarpRows, kMergeStride = Layout::kMergeStride;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ FewSequences cut;
  __shared__ float2 group_weights[kGroups][kRows];
  __shared__ float factors[kGroups][kRows];
  __shared__ float row_memory[kFresh ? MAKERS : 1][kFresh ? D : 1];
  __shared__ bool last;
  float* chunk_factors = reinterpret_cast<float*>(shared + Layout::kRingBytes + Layout::kBuffers * Layout::kBufferBytes);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const bool reader = warp < READERS;
  const int group = warp / MW, row_warp = warp % MW, member = row_warp * 32 + lane;  // of a reader
  const int maker = thread - READERS * 32;
  const int Hkv = shape.Hkv, G = shape.group();
  in.length += first_sequence;
  const int total = cut_sequences(shape, in, plan, sequences, cut, lane);
  auto item_of = [&](int id) { return FewItem::of(id, plan, shape.T, cut, sequences, kRows); };
  auto token_of = [&](int row) { return divided(row, plan.per_head); };
  auto buffer_of = [&](int number) { return shared + Layout::kRingBytes + number % Layout::kBuffers * Layout::kBufferBytes; };

  // ---- readers: what this group copies next, half tiles of its tiles of the block's items, in order ----
  constexpr int kRow = Layout::kRowBytes;
  const int ring_at = Layout::kStages + group * HALVES * Layout::kHalfBytes;
  const uint32_t ring = shared_address(shared) + ring_at, stage = shared_address(shared) + group * Layout::kStageBytes;
  int next_id = blockIdx.x, next_tile = group, next_slots = 0, next_there = 0, next_place = 0;
  bool next_values = false;
  size_t next_row = 0;
  auto find_next = [&] {
#pragma unroll 1
    for (; next_id < total; next_id += gridDim.x, next_tile = group) {
      const FewItem item = item_of(next_id);
      if (next_tile * kTileSlots >= item.slots) continue;
      // New slots are not in the cache yet where the kernel makes them itself.
      next_slots = item.slots, next_there = kFresh ? min(item.slots, item.length - item.first) : item.slots;
      next_row = (size_t(first_sequence + item.b) * Hkv + item.h) * shape.S + item.first;
      return;
    }
  };
  auto copy_next = [&] {
    if (next_id < total) {
      const unsigned char* source = (next_values ? in.v_cache : in.k_cache) + (next_row + next_tile * kTileSlots) * kRow;
      copy_rows<T, Cache, D, kTileSlots, MW * 32>(ring + next_place * Layout::kHalfBytes, source, next_there - next_tile * kTileSlots, member);
      if (next_values) {
        next_tile += kGroups;
        if (next_tile * kTileSlots >= next_slots) next_id += gridDim.x, next_tile = group, find_next();
      }
      next_values = !next_values;
      next_place = next_place + 1 == HALVES ? 0 : next_place + 1;
    }
    end_copies();
  };
  auto meet = [&] {
    if constexpr (MW == 1) __syncwarp();
    else asm volatile("bar.sync %0,%1;" ::"r"(kGroupBarrier + group), "n"(MW * 32) : "memory");
  };
  // New slots of a tile, which no copy could have. `old`: slots of the chunk that were there before.
  auto add_new = [&](uint32_t half, const T* rows, int first, int old, int end) {
    constexpr int kUnits = D / 8;
#pragma unroll 1
    for (int at = max(0, old - first) * kUnits + member; at < min(kTileSlots, end - first) * kUnits; at += MW * 32) {
      const int row = at / kUnits, unit = at % kUnits;
      const uint4 x = reinterpret_cast<const uint4*>(rows + (first + row - old) * D)[unit];
      asm volatile("st.shared.v4.b32 [%0],{%1,%2,%3,%4};" ::"r"(half + row * D * 2 + ((unit ^ exchange<D>(row)) << 4)), "r"(x.x), "r"(x.y), "r"(x.z),
                   "r"(x.w)
                   : "memory");
    }
    meet();
  };

  // ---- makers ----
  // The rows of an item's queries, and of its new keys and values, which are written to the cache, too. `begin_block`: the kernel before may
  // still be making what they are made from, and the readers wait with most of their copies until these loads are on their way.
  auto make_rows = [&](int id, int number, bool begin_block) {
    using Row = LaneRow<T, D>;
    constexpr int kTogether = 2, kStep = kFresh ? MAKERS : 1;
    const FewItem item = item_of(id);
    T* queries = reinterpret_cast<T*>(buffer_of(number));
    T *keys = queries + kRows * Layout::kStride, *values = keys + kMostFresh * D;
    const size_t token = size_t(first_sequence + item.b) * shape.T, angles = (first_sequence + item.b) * shape.table_stride;
    const int begin = max(0, item.first - item.length), fresh = max(0, item.first + item.slots - item.length - begin);
    const int jobs = plan.rows + 2 * fresh;
#pragma unroll 1
    for (int job0 = maker / 32; job0 < jobs || begin_block; job0 += kStep * kTogether) {
      Row row[kTogether];
      Turn<T, D> turn[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int job = job0 + i * kStep, key = job - plan.rows, t = key < 0 ? token_of(job) : begin + key / 2;
        if (job < jobs && (key < 0 || key % 2 == 0))
          turn[i] = Turn<T, D>::of(key < 0 ? in.q_norm : in.k_norm, in.cos, in.sin, angles + size_t(item.length + t) * (shape.R / 2), shape.R, lane);
      }
      if (begin_block) wait_for_previous();
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int job = job0 + i * kStep, key = job - plan.rows;
        if (job >= jobs) continue;
        if (const int t = token_of(job); key < 0) row[i] = Row::of(in.q + (token + t) * shape.q_stride + (item.h * G + job - t * G) * D, lane);
        else row[i] = Row::of((key % 2 ? in.v : in.k) + (token + begin + key / 2) * shape.kv_stride + item.h * D, lane);
      }
      if (begin_block) asm volatile("bar.arrive %0,%1;" ::"n"(kLoadsBarrier), "n"(kThreads) : "memory");
      begin_block = false;
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int job = job0 + i * kStep, key = job - plan.rows, t = begin + key / 2;
        if (job >= jobs) continue;
        if (key < 0 || key % 2 == 0) row[i] = turn[i](row[i], shape.R, plan.eps, row_memory[kFresh ? maker / 32 : 0], lane);
        const size_t place = ((size_t(first_sequence + item.b) * Hkv + item.h) * shape.S + item.length + t) * kRow;
        if (key >= 0) Cache::template keep<T, D>(row[i], (key % 2 ? in.v_cache : in.k_cache) + place, lane);
        row[i].store(key < 0 ? queries + job * Layout::kStride : (key % 2 ? values : keys) + t * D, lane);
      }
    }
  };

  // y = o * sigmoid(gate) of four values of a row.
  auto gate_of = [&](const FewItem& item, int row, int d) {
    const int t = token_of(row);
    const size_t token = size_t(first_sequence + item.b) * shape.T + t;
    return __ldcg(reinterpret_cast<const uint2*>(in.gate + token * shape.gate_stride + (item.h * G + row - t * G) * D + d));
  };
  auto write = [&](const FewItem& item, int row, int d, float4 o, uint2 gate_bits) {
    const int t = token_of(row);
    const size_t token = size_t(first_sequence + item.b) * shape.T + t;
    union {
      uint2 bits;
      T item[4];
    } gate, y;
    gate.bits = gate_bits;
    y.item[0] = from_float<T>(o.x * opened(to_float(gate.item[0]))), y.item[1] = from_float<T>(o.y * opened(to_float(gate.item[1])));
    y.item[2] = from_float<T>(o.z * opened(to_float(gate.item[2]))), y.item[3] = from_float<T>(o.w * opened(to_float(gate.item[3])));
    *reinterpret_cast<uint2*>(in.y + (token * shape.Hq + item.h * G + row - t * G) * D + d) = y.bits;
  };
  auto head_of = [&](const FewItem& item) { return (size_t(item.b) * Hkv + item.h) * plan.blocks + item.block; };
  auto base_of = [&](const FewItem& item) { return head_of(item) * plan.most_chunks; };

  // Counts the chunk of an item, whose sums all threads have written, and adds up a sequence and head of which it was the last.
  auto count_chunk = [&](const FewItem& item, int rows) {
    if (thread == 0) {
      __threadfence();
      unsigned* counter = work.counters + head_of(item);
      last = atomicAdd(counter, 1u) == unsigned(item.chunks) - 1;
      if (last) {
        *counter = 0;
        __threadfence();
      }
    }
    __syncthreads();
    if (!last) return;
    combine_factors(work.weights + base_of(item) * kRows, kRows, rows, item.chunks, chunk_factors, warp, kThreads / 32, lane);
    __syncthreads();
#pragma unroll 1
    for (int at = thread; at < rows * D / 4; at += kThreads) {
      const int row = at / (D / 4), d = at % (D / 4) * 4;
      const uint2 gate = gate_of(item, item.block * kRows + row, d);
      const float4 o = combined<kRows * D / 4>(work.partial + (base_of(item) * kRows + row) * D + d, chunk_factors + row * item.chunks, item.chunks);
      write(item, item.block * kRows + row, d, o, gate);
    }
  };

  if (reader) {
    find_next();
    if (!kFresh) wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < HALVES - 1; i++) {
      if (kFresh && i == 2) asm volatile("bar.sync %0,%1;" ::"n"(kLoadsBarrier), "n"(kThreads) : "memory");
      copy_next();
    }
    if (kFresh && HALVES <= 3) asm volatile("bar.sync %0,%1;" ::"n"(kLoadsBarrier), "n"(kThreads) : "memory");
  } else if (int(blockIdx.x) < total) {
    make_rows(blockIdx.x, 0, true);
  } else {
    asm volatile("bar.arrive %0,%1;" ::"n"(kLoadsBarrier), "n"(kThreads) : "memory");
  }
  wait_for_previous();
  let_next_start();

  int place = 0, number = 0;
#pragma unroll 1
  for (int id = blockIdx.x; id < total; id += gridDim.x, number++) {
    const FewItem item = item_of(id);
    const bool whole = item.chunks == 1;
    const int rows = min(kRows, plan.rows - item.block * kRows), own_row = item.block * kRows;
    float* merge = reinterpret_cast<float*>(buffer_of(number));  // where the new rows are until they have been read
    ColumnTile<T, D, EIGHTS> tile;
    __syncthreads();
    const int first_at = thread / (D / 4), first_d = thread % (D / 4) * 4;
    uint2 gate{};
    if (whole && first_at < min(rows, Layout::kPassRows)) gate = gate_of(item, own_row + first_at, first_d);
    if (reader) {
      const T* queries = reinterpret_cast<const T*>(buffer_of(number));
      const T *new_keys = queries + kRows * Layout::kStride, *new_values = new_keys + kMostFresh * D;
      const int old = item.length - item.first;
      if constexpr (kFresh) {
        tile.begin(queries + row_warp * kWarpRows * Layout::kStride, Layout::kStride, lane);
      } else {
        const size_t head = size_t(first_sequence + item.b) * Hkv + item.h;
        tile.begin(static_cast<const T*>(work.queries) + (head * plan.padded_rows + own_row + row_warp * kWarpRows) * D, D, lane);
      }
      int visible[EIGHTS][2];
#pragma unroll
      for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++)
          visible[n][i] = old + min(token_of(own_row + row_warp * kWarpRows + n * 8 + lane % 4 * 2 + i), shape.T - 1) + 1;
      }
#pragma unroll 1
      for (int first = group * kTileSlots; first < item.slots; first += kGroups * kTileSlots) {
        float s[EIGHTS][4];
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
          wait_for_copies<HALVES - 2>();
          meet();
          copy_next();
          uint32_t at = ring + place * Layout::kHalfBytes;
          if constexpr (!Cache::kPlain) {
            expand_tile<T, Cache, D, kTileSlots, MW * 32>(stage, shared + ring_at + place * Layout::kHalfBytes, member);
            meet();
            at = stage;
          }
          place = place + 1 == HALVES ? 0 : place + 1;
          if (kFresh && first + kTileSlots > old) add_new(at, half == 0 ? new_keys : new_values, first, old, item.slots);
          if (half == 0) {
            tile.scores(s, at, lane);
            tile.weigh(s, visible, first, first + kTileSlots <= old + 1, plan.scale, lane);
          } else {
            tile.add_values(s, at, lane);
          }
        }
      }
      tile.finish();
      if (lane < 4) {
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
          for (int i = 0; i < 2; i++) group_weights[group][row_warp * kWarpRows + n * 8 + lane * 2 + i] = make_float2(tile.largest[n][i], tile.sum[n][i]);
        }
      }
    } else if (id + int(gridDim.x) < total) {
      make_rows(id + gridDim.x, number + 1, false);
    }
    __syncthreads();

    // The groups' sums of each row, in the order of the groups.
    if (thread < kRows) {
      float2 all = make_float2(-INFINITY, 0.0f);
#pragma unroll
      for (int g = 0; g < kGroups; g++) all.x = fmaxf(all.x, group_weights[g][thread].x);
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        const float2 w = group_weights[g][thread];
        factors[g][thread] = w.x == -INFINITY ? 0.0f : power_of_two(w.x - all.x);
        all.y += factors[g][thread] * w.y;
      }
      if (!whole) work.weights[(base_of(item) + item.chunk) * kRows + thread] = all;
#pragma unroll
      for (int g = 0; g < kGroups; g++) factors[g][thread] *= whole ? inverse_of(all.y) : 1.0f;
    }
#pragma unroll 1
    for (int pass = 0; pass < rows; pass += Layout::kPassRows) {
      if (reader) {
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int row = row_warp * kWarpRows + n * 8 + lane % 4 * 2 + i - pass;
            if (row < 0 || row >= Layout::kPassRows) continue;
            float* into = merge + (group * Layout::kPassRows + row) * kMergeStride + lane / 4;
#pragma unroll
            for (int m = 0; m < D / 16; m++) into[m * 16] = tile.o[m][n][i], into[m * 16 + 8] = tile.o[m][n][i + 2];
          }
        }
      }
      __syncthreads();
#pragma unroll 1
      for (int at = thread; at < Layout::kPassRows * D / 4; at += kThreads) {
        const int row = at / (D / 4), d = at % (D / 4) * 4;
        if (pass + row >= rows) break;
        if (whole && (pass > 0 || at != thread)) gate = gate_of(item, own_row + pass + row, d);
        float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int g = 0; g < kGroups; g++) add_scaled(o, factors[g][pass + row], *reinterpret_cast<const float4*>(merge + (g * Layout::kPassRows + row) * kMergeStride + d));
        if (whole) write(item, own_row + pass + row, d, o, gate);
        else *reinterpret_cast<float4*>(work.partial + ((base_of(item) + item.chunk) * kRows + pass + row) * D + d) = o;
      }
      __syncthreads();
    }
    if (!whole) count_chunk(item, rows);
  }
  wait_for_copies<0>();
}

template <typename T, typename Cache, int D, int EIGHTS, int MW, int READERS, int HALVES, int MAKERS>
__global__ void __launch_bounds__((READERS + MAKERS) * 32, 1) attention_few(
    const __grid_constant__ AttentionShape shape, const __grid_constant__ AttentionTensors<T> in, const __grid_constant__ FewPlan plan,
    const __grid_constant__ FewWorkspace work, int first_sequence, int sequences) {
  if constexpr (FewLayout<Cache, D, EIGHTS, MW, READERS, HALVES, MAKERS>::kAllShared <= kSharedOfBlock)
    few_tokens_of_block<T, Cache, D, EIGHTS, MW, READERS, HALVES, MAKERS>(shape, in, plan, work, first_sequence, sequences);
}

}  // namespace qwen
