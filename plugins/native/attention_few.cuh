// Attention of a few new tokens over a long past, which is the time of reading the past: the slots of a sequence are cut into chunks, each
// read by one block, and the block that finishes the last chunk of a sequence and head adds them up.
//
// The grid does not depend on lengths, which are data: a recorded CUDA graph serves all of them. Where a sequence is cut depends on its own
// length alone, and chunks are added in their order, so its results do not depend on the others.
#pragma once

#include "attention_rows.cuh"
#include "attention_tile.cuh"

namespace qwen {

constexpr int kTileSlots = 16;
constexpr int kMostSequences = 256;  // of a launch
constexpr int kMostChunks = 128;
constexpr int kMostFresh = 16;  // new tokens of a call whose rows the kernel makes itself

struct FewPlan {
  int rows;          // T * G
  int padded_rows;   // whole row tiles
  int blocks;        // row blocks
  int most_chunks;   // of a sequence
  int least_slots;   // of a chunk
  float scale;       // with log2(e)
  float eps;
};

struct FewWorkspace {
  const void* queries;  // of attention_prepare, where the kernel does not make them itself
  float* partial;   // [sequence, kv head, row block, chunk][rows of a block][D]
  float2* weights;  // [...][rows of a block]: largest score, sum
  unsigned* counters;
};

// Slots of a chunk of a sequence that has `slots`.
__device__ inline int chunk_slots(const FewPlan& plan, int slots) {
  const int even = (slots + plan.most_chunks - 1) / plan.most_chunks;
  return max(plan.least_slots, (even + 31) / 32 * 32);
}

// MW warps share the keys of one tile, each with 16 rows; WARPS / MW such groups read different tiles. RING halves of tiles (keys or values) per
// warp are in shared memory. FRESH: the kernel makes the rows of the new tokens itself, in one launch.
template <int D, int MW, int WARPS, int RING, bool FRESH>
struct FewLayout {
  static constexpr int kGroups = WARPS / MW, kRows = MW * kRowTile, kHalves = RING * MW, kHalfBytes = kTileSlots * D * 2;
  static constexpr int kPassRows = 4 * MW;  // rows whose sums are brought together at a time
  static constexpr int kStride = D + 8;  // of new queries: eight rows of one column lie in different banks
  static constexpr int kRingBytes = kGroups * kHalves * kHalfBytes;
  // Behind the ring, one after the other: new queries, keys and values; sums of the groups; factors of the chunks.
  static constexpr int kFreshBytes = FRESH ? (kRows * kStride + 2 * kMostFresh * D) * 2 : 0;
  static constexpr int kMergeBytes = kGroups * kPassRows * D * 4, kFactorBytes = kRows * kMostChunks * 4;
  static constexpr int kBehind = kFreshBytes > kMergeBytes ? kFreshBytes : kMergeBytes;
  static constexpr int kShared = kRingBytes + (kBehind > kFactorBytes ? kBehind : kFactorBytes);
};

template <typename T, int D, int MW, int WARPS, int RING, bool FRESH>
__global__ void __launch_bounds__(WARPS * 32, 1)
    attention_few(AttentionShape shape, AttentionTensors<T> in, FewPlan plan, FewWorkspace work, int first_sequence, int sequences) {
  using Layout = FewLayout<D, MW, WARPS, RING, FRESH>;
  constexpr int kGroups = Layout::kGroups, kRows = Layout::kRows, kHalves = Layout::kHalves, kThreads = WARPS * 32;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ int starts[kMostSequences + 1];  // chunks of the sequences before, times Hkv * blocks
  __shared__ float2 group_weights[kGroups][kRows];
  __shared__ float factors[kGroups][kRows];
  __shared__ bool last;
  __shared__ float row_memory[FRESH ? WARPS : 1][D];
  float* merge = reinterpret_cast<float*>(shared + Layout::kRingBytes);
  T* new_queries = reinterpret_cast<T*>(shared + Layout::kRingBytes);
  T *new_keys = new_queries + kRows * Layout::kStride, *new_values = new_keys + kMostFresh * D;

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, group = warp / MW, row_warp = warp % MW;
  const int member = row_warp * 32 + lane;  // of the group
  const int Hkv = shape.Hkv, G = shape.group(), per_chunk = Hkv * plan.blocks;
  in.length += first_sequence;

  // The lengths were written before the kernels of this call. Every warp makes the same sums: none waits for another.
  int total = 0;
  for (int b0 = 0; b0 < sequences; b0 += 32) {
    int count = 0;
    if (b0 + lane < sequences) {
      const int slots = length_of(shape, in, b0 + lane) + shape.T, size = chunk_slots(plan, slots);
      count = (slots + size - 1) / size * per_chunk;
    }
    int up_to = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, up_to, step);
      if (lane >= step) up_to += before;
    }
    if (b0 + lane < sequences) starts[b0 + lane] = total + up_to - count;
    total += __shfl_sync(0xffffffffu, up_to, 31);
  }
  if (lane == 0) starts[sequences] = total;
  __syncwarp();

  struct Item {
    int b, h, block, chunk, chunks, length, first, slots;  // `slots` that the rows of this block see, from `first` on
  };
  auto item_of = [&](int id) {
    Item item;
    int low = 0, high = sequences;  // the sequence with starts[low] <= id < starts[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (starts[middle] <= id ? low : high) = middle;
    }
    item.b = low;
    item.length = length_of(shape, in, low);
    const int slots = item.length + shape.T, size = chunk_slots(plan, slots), rest = id - starts[low];
    item.chunks = (slots + size - 1) / size;
    item.block = rest % plan.blocks, item.chunk = rest / plan.blocks % item.chunks, item.h = rest / plan.blocks / item.chunks;
    item.first = item.chunk * size;
    const int seen = item.length + min((item.block * kRows + kRows - 1) / G, shape.T - 1) + 1;
    item.slots = max(0, min(size, min(slots, seen) - item.first));
    return item;
  };

  // What this group copies next: half tiles of its tiles of its block's items, in order.
  const uint32_t ring = shared_address(shared) + group * kHalves * Layout::kHalfBytes;
  int next_id = blockIdx.x, next_tile = group, next_slots = 0, next_place = 0, next_old = 0;
  bool next_values = false;
  size_t next_row = 0;
  auto find_next = [&] {
    while (next_id < total) {
      const Item item = item_of(next_id);
      if (next_tile * kTileSlots < item.slots) {
        next_slots = item.slots, next_old = item.length - item.first;
        next_row = (size_t(first_sequence + item.b) * Hkv + item.h) * shape.S + item.first;
        return;
      }
      next_id += gridDim.x, next_tile = group;
    }
  };
  auto copy_next = [&] {
    if (next_id < total) {
      const T* source = (next_values ? in.v_cache : in.k_cache) + (next_row + next_tile * kTileSlots) * D;
      const int there = (FRESH ? min(next_old, next_slots) : next_slots) - next_tile * kTileSlots;
      copy_tile<T, D, kTileSlots, MW * 32>(ring + next_place * Layout::kHalfBytes, source, there, member);
      if (next_values) {
        next_tile += kGroups;
        if (next_tile * kTileSlots >= next_slots) next_id += gridDim.x, next_tile = group, find_next();
      }
      next_values = !next_values;
      next_place = next_place + 1 == kHalves ? 0 : next_place + 1;
    }
    end_copies();
  };
  auto meet = [&] {
    if constexpr (MW == 1) __syncwarp();
    else asm volatile("bar.sync %0,%1;" ::"r"(1 + group), "n"(MW * 32) : "memory");
  };

  // Slots of earlier calls are complete; those of this call are when the kernel before has finished.
  find_next();
  bool waited = false;
  for (int i = 0; i < kHalves - 1; i++) {
    if (!FRESH && !waited && next_id < total && (next_tile + 1) * kTileSlots > next_old) wait_for_previous(), waited = true;
    copy_next();
  }
  if (!waited) wait_for_previous();
  let_next_start();

  // The rows of a chunk's queries, and of its new keys and values, which are written to the cache, too. A warp makes several at a time.
  [[maybe_unused]] auto make_rows = [&](const Item& item, size_t sequence_head) {
    using Row = LaneRow<T, D>;
    constexpr int kTogether = 4;
    const size_t token = size_t(first_sequence + item.b) * shape.T;
    const size_t angles = (first_sequence + item.b) * shape.table_stride + size_t(item.length) * (shape.R / 2);
    const int begin = max(0, item.first - item.length), fresh = max(0, item.first + item.slots - item.length - begin);
    const int jobs = plan.rows + 2 * fresh;
    for (int first = warp; first < jobs; first += WARPS * kTogether) {
      Row row[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int job = first + i * WARPS, key = job - plan.rows;
        if (job >= jobs) break;
        if (key < 0) row[i] = Row::of(in.q + (token + job / G) * shape.q_stride + (item.h * G + job % G) * D, lane);
        else row[i] = Row::of((key % 2 ? in.v : in.k) + (token + begin + key / 2) * shape.kv_stride + item.h * D, lane);
      }
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int job = first + i * WARPS, key = job - plan.rows;
        if (job >= jobs) break;
        const int t = key < 0 ? job / G : begin + key / 2;
        if (key < 0 || key % 2 == 0)
          row[i] = turned<T, D>(row[i], key < 0 ? in.q_norm : in.k_norm, in.cos, in.sin, angles + size_t(t) * (shape.R / 2), shape.R, plan.eps, row_memory[FRESH ? warp : 0], lane);
        row[i].store(key < 0 ? new_queries + job * Layout::kStride : (key % 2 ? new_values : new_keys) + t * D, lane);
        if (key >= 0) row[i].store((key % 2 ? in.v_cache : in.k_cache) + (sequence_head * shape.S + item.length + t) * D, lane);
      }
    }
  };
  // New slots of a tile, which no copy could have.
  [[maybe_unused]] auto add_new = [&](uint32_t half, const T* rows, int first, int old, int end) {
    constexpr int kUnits = D / 8;
    for (int at = max(0, old - first) * kUnits + member; at < min(kTileSlots, end - first) * kUnits; at += MW * 32) {
      const int row = at / kUnits, unit = at % kUnits;
      const uint4 x = reinterpret_cast<const uint4*>(rows + (first + row - old) * D)[unit];
      asm volatile("st.shared.v4.b32 [%0],{%1,%2,%3,%4};" ::"r"(half + row * D * 2 + ((unit ^ exchange<D>(row)) << 4)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                   : "memory");
    }
    meet();
  };

  int place = 0;
  for (int id = blockIdx.x; id < total; id += gridDim.x) {
    const Item item = item_of(id);
    const size_t sequence_head = size_t(first_sequence + item.b) * Hkv + item.h;
    const int first_row = item.block * kRows + row_warp * kRowTile, old = item.length - item.first;
    RowTile<T, D, kTileSlots> tile;
    if constexpr (FRESH) {
      make_rows(item, sequence_head);
      __syncthreads();
      tile.template begin<Layout::kStride>(new_queries + row_warp * kRowTile * Layout::kStride, lane);
    } else {
      tile.template begin<D>(static_cast<const T*>(work.queries) + (sequence_head * plan.padded_rows + first_row) * D, lane);
    }
    int visible[2];
#pragma unroll
    for (int half = 0; half < 2; half++) visible[half] = visible_slots(first_row + lane / 4 + half * 8, G, shape.T, item.length, item.first);
    auto step = [&](auto&& compute) {
      wait_for_copies<kHalves - 2>();
      meet();
      copy_next();
      compute(ring + place * Layout::kHalfBytes);
      place = place + 1 == kHalves ? 0 : place + 1;
    };
    for (int i = group; i * kTileSlots < item.slots; i += kGroups) {
      const int first = i * kTileSlots;
      float s[kTileSlots / 8][4];
      const bool fresh = FRESH && first + kTileSlots > old;
      step([&](uint32_t keys) {
        if (fresh) add_new(keys, new_keys, first, old, item.slots);
        tile.scores(s, keys, lane);
      });
      const int seen[2] = {visible[0] - first, visible[1] - first};
      tile.weigh(s, seen, item.first + first + kTileSlots <= item.length + 1, plan.scale, lane);
      step([&](uint32_t values) {
        if (fresh) add_new(values, new_values, first, old, item.slots);
        tile.add_values(s, values, lane);
      });
    }
    tile.finish();

    // The groups' sums of each row, in the order of the groups.
    if (lane % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; half++)
        group_weights[group][row_warp * kRowTile + lane / 4 + half * 8] = make_float2(tile.largest[half], tile.sum[half]);
    }
    __syncthreads();
    const bool whole = item.chunks == 1;
    const size_t base = ((sequence_head - size_t(first_sequence) * Hkv) * plan.blocks + item.block) * plan.most_chunks;
    if (thread < kRows) {
      float top = -INFINITY, sum = 0.0f;
#pragma unroll
      for (int g = 0; g < kGroups; g++) top = fmaxf(top, group_weights[g][thread].x);
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        const float2 w = group_weights[g][thread];
        const float factor = w.x == -INFINITY ? 0.0f : power_of_two(w.x - top);
        factors[g][thread] = factor;
        sum += factor * w.y;
      }
      if (whole) {
        // A chunk of one sequence is all of it: the rows are complete.
        const float scale = 1.0f / sum;
#pragma unroll
        for (int g = 0; g < kGroups; g++) factors[g][thread] *= scale;
      } else {
        work.weights[(base + item.chunk) * kRows + thread] = make_float2(top, sum);
      }
    }
    // y = o * sigmoid(gate) of four values of a row.
    auto write = [&](int row, int d, float4 o) {
      const int t = row / G, head = item.h * G + row % G;
      const size_t token = size_t(first_sequence + item.b) * shape.T + t;
      union {
        uint2 bits;
        T item[4];
      } gate, y;
      gate.bits = *reinterpret_cast<const uint2*>(in.gate + token * shape.gate_stride + head * D + d);
      y.item[0] = from_float<T>(o.x * opened(to_float(gate.item[0]))), y.item[1] = from_float<T>(o.y * opened(to_float(gate.item[1])));
      y.item[2] = from_float<T>(o.z * opened(to_float(gate.item[2]))), y.item[3] = from_float<T>(o.w * opened(to_float(gate.item[3])));
      *reinterpret_cast<uint2*>(in.y + (token * shape.Hq + head) * D + d) = y.bits;
    };
    const int rows = min(kRows, plan.rows - item.block * kRows);
    for (int pass = 0; pass < rows; pass += Layout::kPassRows) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = row_warp * kRowTile + lane / 4 + half * 8 - pass;
        if (0 <= row && row < Layout::kPassRows) {
          float* into = merge + (group * Layout::kPassRows + row) * D + lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < D / 8; j++) *reinterpret_cast<float2*>(into + j * 8) = make_float2(tile.o[j * 4 + half * 2], tile.o[j * 4 + half * 2 + 1]);
        }
      }
      __syncthreads();
      for (int at = thread; at < Layout::kPassRows * D / 4; at += kThreads) {
        const int row = at / (D / 4), d = at % (D / 4) * 4;
        if (pass + row >= rows) break;
        float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int g = 0; g < kGroups; g++) {
          const float factor = factors[g][pass + row];
          const float4 part = *reinterpret_cast<const float4*>(merge + (g * Layout::kPassRows + row) * D + d);
          o.x = fmaf(factor, part.x, o.x), o.y = fmaf(factor, part.y, o.y), o.z = fmaf(factor, part.z, o.z), o.w = fmaf(factor, part.w, o.w);
        }
        if (whole) write(item.block * kRows + pass + row, d, o);
        else *reinterpret_cast<float4*>(work.partial + ((base + item.chunk) * kRows + pass + row) * D + d) = o;
      }
      __syncthreads();
    }
    if (whole) continue;

    // The block that comes last adds the chunks up.
    if (thread == 0) {
      __threadfence();
      unsigned* counter = work.counters + (sequence_head - size_t(first_sequence) * Hkv) * plan.blocks + item.block;
      last = atomicAdd(counter, 1u) == unsigned(item.chunks) - 1;
      if (last) *counter = 0;
    }
    __syncthreads();
    if (!last) continue;
    __threadfence();
    float* chunk_factors = merge;  // [rows][chunks]
    for (int row = warp; row < rows; row += WARPS) {
      float2 w[kMostChunks / 32];
      float top = -INFINITY, sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kMostChunks / 32; i++) {
        const int c = i * 32 + lane;
        w[i] = c < item.chunks ? __ldcg(&work.weights[(base + c) * kRows + row]) : make_float2(-INFINITY, 0.0f);
        top = fmaxf(top, w[i].x);
      }
#pragma unroll
      for (int far = 16; far; far /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, far));
#pragma unroll
      for (int i = 0; i < kMostChunks / 32; i++) {
        w[i].x = w[i].x == -INFINITY ? 0.0f : power_of_two(w[i].x - top);
        sum += w[i].x * w[i].y;
      }
      const float scale = 1.0f / warp_sum(sum);
#pragma unroll
      for (int i = 0; i < kMostChunks / 32; i++)
        if (i * 32 + lane < item.chunks) chunk_factors[row * item.chunks + i * 32 + lane] = w[i].x * scale;
    }
    __syncthreads();
    for (int at = thread; at < rows * D / 4; at += kThreads) {
      const int row = at / (D / 4), d = at % (D / 4) * 4;
      const float4* parts = reinterpret_cast<const float4*>(work.partial + (base * kRows + row) * D + d);
      const float* factor = chunk_factors + row * item.chunks;
      float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      constexpr int kTogether = 33;  // loads on their way
      for (int c = 0; c < item.chunks; c += kTogether) {
        float4 part[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; i++) part[i] = __ldcg(parts + size_t(min(c + i, item.chunks - 1)) * (kRows * D / 4));
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
          const float f = c + i < item.chunks ? factor[c + i] : 0.0f;
          o.x = fmaf(f, part[i].x, o.x), o.y = fmaf(f, part[i].y, o.y), o.z = fmaf(f, part[i].z, o.z), o.w = fmaf(f, part[i].w, o.w);
        }
      }
      write(item.block * kRows + row, d, o);
    }
    __syncthreads();
  }
  wait_for_copies<0>();
}

}  // namespace qwen
