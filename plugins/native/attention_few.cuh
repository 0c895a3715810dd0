// Attention of a few new tokens over a past. Behind a long one its time is that of reading it: the slots of a sequence are cut into chunks, each
// read by one block, and the block that finishes the last chunk of a sequence and head adds them up. Behind a short one it is a row of waits, for
// loads, for products and for the kernel before.
//
// The grid does not depend on lengths, which are data: a recorded CUDA graph serves all of them. Where a sequence is cut depends on its own
// length alone, and chunks are added in their order, so its results do not depend on the others.
#pragma once

#include "attention_columns.cuh"
#include "attention_few_plan.cuh"
#include "attention_few_sum.cuh"
#include "attention_rows.cuh"

namespace qwen {

// Hidden from the compiler: what depends on it is made where it is used, not kept in registers over the loop.
__device__ inline int made_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// What a block has of the sequences that are cut in meeting.cut.
template <typename T, typename Cache, int D, int MW, int WARPS, int SLOTS, int HALVES, bool FRESH>
__device__ __forceinline__ void read_sequences(const AttentionShape& shape, const AttentionTensors<T>& in, const FewPlan& plan, const FewWorkspace& work,
                                               int first_sequence, int sequences, FewMeeting<WARPS>& meeting) {
  using Layout = FewLayout<Cache, D, MW, WARPS, SLOTS, HALVES, FRESH>;
  constexpr int kGroups = Layout::kGroups, kRows = Layout::kRows, kThreads = Layout::kThreads;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& group_weights = *reinterpret_cast<float2(*)[kGroups][kRows]>(meeting.weights);
  auto& factors = *reinterpret_cast<float(*)[kGroups][kRows]>(meeting.factors);
  unsigned char* const buffer = shared + Layout::kRingBytes;  // new rows, later sums of chunks

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int group = warp / MW, row_warp = warp % MW, member = row_warp * 32 + lane;
  const int Hkv = shape.Hkv, G = shape.group();
  const int total = meeting.cut.starts[sequences] * plan.blocks, step = gridDim.x, first_id = blockIdx.x;
  if (first_id >= total) return;
  auto item_of = [&](int id) { return FewItem::of(id, plan, shape.T, meeting.cut, sequences, kRows); };
  auto token_of = [&](int row) { return divided(row, plan.per_head); };

  // ---- what this group copies next, half tiles of its tiles of the block's items, in order ----
  constexpr int kRow = Layout::kRowBytes;
  const int ring_at = Layout::kStages + group * HALVES * Layout::kHalfBytes;
  const uint32_t ring = shared_address(shared) + ring_at, stage = shared_address(shared) + group * Layout::kStageBytes;
  int next_id = first_id, next_tile = group, next_slots = 0, next_there = 0, next_place = 0;
  bool next_values = false;
  size_t next_row = 0;
  auto find_next = [&] {
#pragma unroll 1
    for (; next_id < total; next_id += step, next_tile = group) {
      const FewItem item = item_of(next_id);
      if (next_tile * SLOTS >= item.slots) continue;
      // New slots are not in the cache yet where the kernel makes them itself.
      next_slots = item.slots, next_there = FRESH ? min(item.slots, item.length - item.first) : item.slots;
      next_row = (size_t(first_sequence + item.b) * Hkv + item.h) * shape.S + item.first;
      return;
    }
  };
  auto copy_next = [&] {
    if (next_id < total) {
      const unsigned char* source = (next_values ? in.v_cache : in.k_cache) + (next_row + next_tile * SLOTS) * kRow;
      copy_rows<T, Cache, D, SLOTS, MW * 32>(ring + next_place * Layout::kHalfBytes, source, next_there - next_tile * SLOTS, member);
      if (next_values) {
        next_tile += kGroups;
        if (next_tile * SLOTS >= next_slots) next_id += step, next_tile = group, find_next();
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
    for (int at = max(0, old - first) * kUnits + member; at < min(SLOTS, end - first) * kUnits; at += MW * 32) {
      const int row = at / kUnits, unit = at % kUnits;
      const uint4 x = reinterpret_cast<const uint4*>(rows + (first + row - old) * D)[unit];
      asm volatile("st.shared.v4.b32 [%0],{%1,%2,%3,%4};" ::"r"(half + row * D * 2 + ((unit ^ exchange<D>(row)) << 4)), "r"(x.x), "r"(x.y), "r"(x.z),
                   "r"(x.w)
                   : "memory");
    }
    meet();
  };

  // With FRESH the kernel before may still be making what the new rows are made from: what was there before is on its way by then, though not so
  // much that the rows would wait behind it.
  constexpr int kEarly = !FRESH || HALVES <= 3 ? HALVES - 1 : 2;
  auto begin_block = [&](const FewItem& item) {
    if constexpr (FRESH) {
      if (warp == WARPS - 1) prefetch_given<kRow>(item, shape, in, first_sequence, lane);
    } else {
      wait_for_previous();
    }
#pragma unroll 1
    for (int i = 0; i < kEarly; i++) copy_next();
    wait_for_previous();
    let_next_start();
  };
  // The rows of an item's queries, and of its new keys and values, which are written to the cache, too.
  auto make_rows = [&](const FewItem& item, bool first) {
    using Row = LaneRow<T, D>;
    constexpr int kTogether = 2;
    T* queries = reinterpret_cast<T*>(buffer);
    T *keys = queries + kRows * Layout::kStride, *values = keys + kMostFresh * D;
    const int sequence = first_sequence + item.b, own_row = item.block * kRows, rows = min(kRows, plan.rows - own_row);
    const int begin = max(0, item.first - item.length), fresh = max(0, item.first + item.slots - item.length - begin);
    const int jobs = rows + 2 * fresh;
    const size_t token = size_t(sequence) * shape.T, angles = sequence * shape.table_stride;
#pragma unroll 1
    for (int job0 = warp; job0 < jobs || first; job0 += WARPS * kTogether) {
      Row row[kTogether];
      Turn<T, D> turn[kTogether];
      if (first) begin_block(item);
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int job = min(job0 + i * WARPS, jobs - 1), key = job - rows, t = key < 0 ? token_of(own_row + job) : begin + key / 2;
        const T* from = key < 0 ? in.q + (token + t) * shape.q_stride + (item.h * G + own_row + job - t * G) * D
                                : (key % 2 ? in.v : in.k) + (token + t) * shape.kv_stride + item.h * D;
        row[i] = Row::of(from, lane);
        turn[i] = Turn<T, D>::of(key < 0 ? in.q_norm : in.k_norm, in.cos, in.sin, angles + size_t(item.length + t) * (shape.R / 2), shape.R, lane);
      }
      if (first) {
#pragma unroll 1
        for (int i = kEarly; i < HALVES - 1; i++) copy_next();
      }
      first = false;
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int job = job0 + i * WARPS, key = job - rows, t = begin + key / 2;
        if (job >= jobs) continue;
        if (key < 0 || key % 2 == 0) row[i] = turn[i](row[i], shape.R, plan.eps, lane);
        const size_t place = ((size_t(sequence) * Hkv + item.h) * shape.S + item.length + t) * kRow;
        if (key >= 0) Cache::template keep<T, D>(row[i], (key % 2 ? in.v_cache : in.k_cache) + place, lane);
        row[i].store(key < 0 ? queries + job * Layout::kStride : (key % 2 ? values : keys) + t * D, lane);
      }
    }
    __syncthreads();
  };

  auto head_of = [&](const FewItem& item) { return (size_t(item.b) * Hkv + item.h) * plan.blocks + item.block; };
  auto base_of = [&](const FewItem& item) { return head_of(item) * plan.most_chunks; };
  auto output_of = [&](const FewItem& item) { return FewOutput<T, D>::of(shape, in, plan, first_sequence + item.b, item.h); };

  // Adds up what this block has of the sequence and head of an item, whose chunk it counted when the counter had `before`.
  auto finish_chunk = [&](int id, unsigned before) {
    const FewItem item = item_of(id);
    const int first_row = item.block * kRows, rows = min(kRows, plan.rows - first_row);
    const FewSlices slices = FewSlices::of(item.chunks, rows * D / 4, kThreads);
    unsigned* const counter = work.counters + head_of(item);
    if (thread == 0) meeting.share = wait_for_share(counter, before, item.chunks, slices.count);
    __syncthreads();
    if (const FewShare share = meeting.share; share.first < slices.count) {
      add_up<kRows, D, kThreads>(slices, share, work.partial + base_of(item) * kRows * D, work.weights + base_of(item) * kRows, item.chunks, first_row,
                                 rows, output_of(item), buffer, thread);
      if (thread == 0) leave_counter(counter, min(item.chunks, slices.count));
    }
    __syncthreads();
  };

  find_next();
  if constexpr (!FRESH) begin_block({});

  int place = 0, counted = -1;  // counted: the item before this one, if its sequence is cut
  unsigned before = 0;          // of its counter, in one thread
#pragma unroll 1
  for (int id = first_id; id < total; id += step) {
    FewItem item = item_of(id);
    bool whole = item.chunks == 1;
    int own_row = item.block * kRows, rows = min(kRows, plan.rows - own_row);
    ColumnTile<T, D, SLOTS> tile;
    if constexpr (FRESH) make_rows(item, id == first_id);
    constexpr int kQuads = kEight * D / 4, kOwnQuads = (kQuads + kThreads - 1) / kThreads;  // of eight rows; of a thread
    const int here = made_here(thread);
    auto quad_of = [&](int i, int& row, int& d) {
      const int at = here + i * kThreads;
      row = at / (D / 4), d = at % (D / 4) * 4;
      return at < kQuads;
    };
    uint2 gates[kOwnQuads];
    if (MW == 1 && whole) {
#pragma unroll
      for (int i = 0; i < kOwnQuads; i++) {
        int row, d;
        if (quad_of(i, row, d) && row < rows) gates[i] = output_of(item).gate_of(own_row + row, d);
      }
    }
    const T* queries = reinterpret_cast<const T*>(buffer);
    const T *new_keys = queries + kRows * Layout::kStride, *new_values = new_keys + kMostFresh * D;
    const int old = item.length - item.first;
    if constexpr (FRESH) {
      tile.begin(queries + row_warp * kEight * Layout::kStride, Layout::kStride, lane);
    } else {
      const size_t head = size_t(first_sequence + item.b) * Hkv + item.h;
      tile.begin(static_cast<const T*>(work.queries) + (head * plan.padded_rows + own_row + row_warp * kEight) * D, D, lane);
    }
    int visible[2];
#pragma unroll
    for (int i = 0; i < 2; i++) visible[i] = old + min(token_of(own_row + row_warp * kEight + lane % 4 * 2 + i), shape.T - 1) + 1;
#pragma unroll 1
    for (int first = group * SLOTS; first < item.slots; first += kGroups * SLOTS) {
      float s[SLOTS / 16][4];
#pragma unroll 1
      for (int half = 0; half < 2; half++) {
        wait_for_copies<HALVES - 2>();
        meet();
        copy_next();
        uint32_t at = ring + place * Layout::kHalfBytes;
        if constexpr (!Cache::kPlain) {
          expand_tile<T, Cache, D, SLOTS, MW * 32>(stage, shared + ring_at + place * Layout::kHalfBytes, member);
          meet();
          at = stage;
        }
        place = place + 1 == HALVES ? 0 : place + 1;
        if (FRESH && first + SLOTS > old) add_new(at, half == 0 ? new_keys : new_values, first, old, item.slots);
        if (half == 0) {
          tile.scores(s, at, lane);
          tile.weigh(s, visible, first, first + SLOTS <= old + 1, plan.scale, lane);
        } else {
          tile.add_values(s, at, lane);
        }
      }
    }
    tile.finish();
    if constexpr (MW > 1) {
      meet();  // the sums come where others of the group may still read values
      // Made again: registers are scarce in between.
      item = item_of(made_here(id));
      whole = item.chunks == 1, own_row = item.block * kRows, rows = min(kRows, plan.rows - own_row);
    }

    // The groups' sums of each row, in the order of the groups; those without a tile have none. Of eight rows a group puts them where values of a
    // tile were, or in the place of the ring that waits for its next copy.
    const int used = min(kGroups, (item.slots + SLOTS - 1) / SLOTS);
    const int merge_at = Cache::kPlain ? ring_at + (place == 0 ? HALVES - 1 : place - 1) * Layout::kHalfBytes : group * Layout::kStageBytes;
    auto place_of = [](int row, int d) { return row * D + d / 32 * 32 + (d % 32 ^ row / 2 * 8); };  // rows of a quad of columns: in different banks
    auto put_sums = [&] {
      float* into = reinterpret_cast<float*>(shared + merge_at);
      const int column = here % 4 * 2, first = here % 32 / 4;
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int m = 0; m < D / 16; m++) {
          into[place_of(column + i, m * 16 + first)] = tile.o[m][i], into[place_of(column + i, m * 16 + first + 8)] = tile.o[m][i + 2];
        }
      }
    };
    if (row_warp == 0 && group < used) put_sums();
    if (member == 0) meeting.merge_at[group] = merge_at;
    if (lane < 4) {
#pragma unroll
      for (int i = 0; i < 2; i++) group_weights[group][row_warp * kEight + lane * 2 + i] = make_float2(tile.largest[i], tile.sum[i]);
    }
    __syncthreads();
    if (thread < kGroups * kRows) {
      const int row = here / kGroups, g = here % kGroups;
      const float2 w = group_weights[g][row];
      float top = w.x;
#pragma unroll
      for (int far = 1; far < kGroups; far *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, far));
      const float factor = w.x == -INFINITY ? 0.0f : power_of_two(w.x - top);
      float sum = factor * w.y;
#pragma unroll
      for (int far = 1; far < kGroups; far *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, far);
      if (!whole && g == 0) work.weights[(base_of(item) + item.chunk) * kRows + row] = make_float2(top, sum);
      factors[g][row] = whole ? factor * inverse_of(sum) : factor;
    }
#pragma unroll 1
    for (int pass = 0; pass * kEight < rows; pass++) {
      if (pass > 0 && row_warp == pass) put_sums();
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kOwnQuads; i++) {
        int row, d;
        const bool there = quad_of(i, row, d);
        const int all_row = pass * kEight + row;
        if (!there || all_row >= rows) continue;
        if (whole && (MW > 1 || pass > 0)) gates[i] = output_of(item).gate_of(own_row + all_row, d);
        float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int g = 0; g < used; g++)
          add_scaled(o, factors[g][all_row], *reinterpret_cast<const float4*>(shared + meeting.merge_at[g] + place_of(row, d) * sizeof(float)));
        if (whole) output_of(item).write(own_row + all_row, d, o, gates[i]);
        else *reinterpret_cast<float4*>(work.partial + ((base_of(item) + item.chunk) * kRows + all_row) * D + d) = o;
      }
      __syncthreads();
    }
    if (whole) continue;
    unsigned then = 0;
    if (thread == 0) then = add_to_counter(work.counters + head_of(item), kOneArrived);  // all have written the sums
    if (counted >= 0) finish_chunk(counted, before);
    counted = id, before = then;
  }
  if (counted >= 0) finish_chunk(counted, before);
  wait_for_copies<0>();
}

template <typename T, typename Cache, int D, int MW, int WARPS, int SLOTS, int HALVES, bool FRESH>
__global__ void __launch_bounds__(WARPS * 32, 1) attention_few(
    const __grid_constant__ AttentionShape shape, const __grid_constant__ AttentionTensors<T> in, const __grid_constant__ FewPlan plan,
    const __grid_constant__ FewWorkspace work, int first_sequence, int sequences) {
  if constexpr (FewLayout<Cache, D, MW, WARPS, SLOTS, HALVES, FRESH>::kShared + kOwnShared<WARPS> <= kSharedOfBlock) {
    __shared__ FewMeeting<WARPS> meeting;
    cut_sequences(shape, in, plan, first_sequence, sequences, meeting.cut, threadIdx.x % 32);
    read_sequences<T, Cache, D, MW, WARPS, SLOTS, HALVES, FRESH>(shape, in, plan, work, first_sequence, sequences, meeting);
  }
}

}  // namespace qwen
