// How attention_few shares its work: the chunks of sequences, the items of blocks, and what is in shared memory.
#pragma once

#include <climits>

#include "attention_cache.cuh"
#include "attention_columns.cuh"

namespace qwen {

constexpr int kMostSequences = 128;  // of a launch
constexpr int kMostChunks = 128, kLeastSlots = 256;  // chunks of a sequence, slots of a chunk
constexpr int kWholeSlots = 2 * kLeastSlots;         // a sequence with fewer is not cut
constexpr int kMostFresh = 8;  // new tokens of a call whose rows attention_few makes itself
constexpr int kEight = 8;      // rows of a warp
constexpr int kGroupBarrier = 1;  // barriers of parts of a block from here on; 0 is that of all of it

// Shared memory that a block can have: for a device with less a kernel is not compiled.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ / 100 == 12)
constexpr int kSharedOfBlock = 99 << 10;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 8
constexpr int kSharedOfBlock = 163 << 10;
#else
constexpr int kSharedOfBlock = 227 << 10;
#endif

struct FewPlan {
  int rows;         // T * G
  int padded_rows;  // of attention_prepare
  int blocks;       // of rows
  float per_block, per_head;  // 1 / blocks, 1 / G
  int most_chunks;  // of a sequence
  float scale;      // with log2(e)
  float eps;
};

struct FewWorkspace {
  const void* queries;  // of attention_prepare, where attention_few does not make them
  float* partial;       // [sequence, kv head, row block, chunk][rows of a block][D]
  float2* weights;      // [...][rows of a block]: largest score, sum
  unsigned* counters;   // [sequence, kv head, row block], zero before and after
};

// How the sequences of a launch are cut.
struct FewSequences {
  int starts[kMostSequences + 1];  // items of the sequences before
  int size[kMostSequences], length[kMostSequences];
};

// Sequences that are read: those with so many slots.
struct FewKept {
  int from, below;
};

// Where the warps of a block meet.
template <int WARPS>
struct FewMeeting {
  FewSequences cut;
  float2 weights[WARPS * kEight];  // of groups and rows: largest score, sum
  float factors[WARPS * kEight];
  int merge_at[WARPS];  // of groups
  bool last;
};

// Factors of rows and chunks.
constexpr int most_factors(int rows) { return rows == 64 ? 4096 : 2048; }

// MW warps share the keys of one tile, each with 8 rows; WARPS / MW such groups read different tiles, and each has HALVES halves of tiles (keys
// or values) in shared memory. With FRESH the kernel makes the rows of the new tokens itself, in one launch.
template <typename Cache, int D, int MW, int WARPS, int HALVES, bool FRESH>
struct FewLayout {
  static constexpr int kThreads = WARPS * 32;
  static constexpr int kGroups = WARPS / MW, kRows = MW * kEight;
  // Rows of bytes become values in memory of their own, which comes first: tiles begin at multiples of a row.
  static constexpr int kRowBytes = kCacheRow<Cache, D>, kHalfBytes = kTileSlots * kRowBytes, kStageBytes = Cache::kPlain ? 0 : kTileSlots * D * 2;
  static constexpr int kStages = kGroups * kStageBytes;
  static constexpr int kStride = D + 8;  // rows of one column lie in different banks
  static constexpr int kRingBytes = kStages + kGroups * HALVES * kHalfBytes;
  // New queries, keys and values; later factors of rows and chunks.
  static constexpr int kFreshBytes = FRESH ? (kRows * kStride + 2 * kMostFresh * D) * 2 : 0, kFactorBytes = most_factors(kRows) * 4;
  static constexpr int kShared = kRingBytes + (kFreshBytes > kFactorBytes ? kFreshBytes : kFactorBytes);
  static_assert((Cache::kPlain ? kHalfBytes : kStageBytes) == kEight * D * 4, "sums of eight rows take the place of a half tile of values");
};

// Dynamic shared memory of attention_few, and what it has beside that.
constexpr int larger(int a, int b) { return a > b ? a : b; }
template <typename Cache, int D, int MW, int WARPS, int HALVES, int HALVES_OF_EIGHT, bool FRESH>
constexpr int few_shared = larger(FewLayout<Cache, D, MW, WARPS, HALVES, FRESH>::kShared,
                                  FRESH ? FewLayout<Cache, D, 1, WARPS, HALVES_OF_EIGHT, FRESH>::kShared : 0);
template <int WARPS>
constexpr int kOwnShared = int(sizeof(FewMeeting<WARPS>));

// a / b for a small a, by 1 / b: exact, and much sooner there.
__device__ inline int divided(int a, float inverse) { return int((float(a) + 0.5f) * inverse); }

// Slots of a chunk of a sequence that has `slots`. A short one is cut into pieces of 256 slots or more, so that it is soon done alone; a long one
// into larger pieces, of which several blocks are busy anyway, since every piece costs some time of its own.
__device__ inline int chunk_slots(const FewPlan& plan, int slots) {
  const int short_ones = divided(slots, 1.0f / kLeastSlots);
  const int wanted = min(short_ones, min(max(8, short_ones / 2), max(32, short_ones / 4))), chunks = max(1, min(plan.most_chunks, wanted));
  return (divided(slots + chunks - 1, inverse_of(float(chunks))) + 31) / 32 * 32;
}

// What one block does at a time: a chunk of a sequence, for a kv head and a block of rows.
struct FewItem {
  int b, h, block, chunk, chunks, length;
  int first, slots;  // the slots that the rows see, from `first` on

  static __device__ FewItem of(int id, const FewPlan& plan, int T, const FewSequences& cut, int sequences, int rows) {
    FewItem item;
    int low = 0, high = sequences;  // the sequence with starts[low] <= id < starts[high]
#pragma unroll 1
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (cut.starts[middle] <= id ? low : high) = middle;
    }
    const int size = cut.size[low], rest = id - cut.starts[low];
    item.b = low, item.length = cut.length[low];
    item.chunks = divided(item.length + T + size - 1, inverse_of(float(size)));
    const int place = divided(rest, plan.per_block);
    item.block = rest - place * plan.blocks;
    item.h = divided(place, inverse_of(float(item.chunks)));
    item.chunk = place - item.h * item.chunks;
    item.first = item.chunk * size;
    const int seen = item.length + min(divided(item.block * rows + rows - 1, plan.per_head), T - 1) + 1;
    item.slots = max(0, min(size, seen - item.first));
    return item;
  }
};

// Cuts the sequences of `kept` lengths; returns the items of all. Lengths were written before the kernels of the call; every warp does the same,
// so that none waits for another.
template <typename T>
__device__ inline int cut_sequences(const AttentionShape& shape, const AttentionTensors<T>& in, const FewPlan& plan, const FewKept kept,
                                    int first_sequence, int sequences, FewSequences& cut, int lane) {
  int total = 0;
#pragma unroll 1
  for (int b0 = 0; b0 < sequences; b0 += 32) {
    int count = 0;
    if (b0 + lane < sequences) {
      const int length = length_of(shape, in, first_sequence + b0 + lane), slots = length + shape.T, size = chunk_slots(plan, slots);
      cut.length[b0 + lane] = length, cut.size[b0 + lane] = size;
      if (kept.from <= slots && slots < kept.below) count = divided(slots + size - 1, inverse_of(float(size))) * shape.Hkv * plan.blocks;
    }
    int up_to = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, up_to, step);
      if (lane >= step) up_to += before;
    }
    if (b0 + lane < sequences) cut.starts[b0 + lane] = total + up_to - count;
    total += __shfl_sync(0xffffffffu, up_to, 31);
  }
  if (lane == 0) cut.starts[sequences] = total;
  __syncwarp();
  return total;
}

// Asks for what an item reads beside the new rows: the second cache has it when it is read.
template <int ROW, typename T>
__device__ inline void prefetch_given(const FewItem& item, const AttentionShape& shape, const AttentionTensors<T>& in, int first_sequence, int lane) {
#if __CUDA_ARCH__ >= 900
  constexpr int kMostSlots = 192;
  const int there = min(min(item.slots, item.length - item.first), kMostSlots), sequence = first_sequence + item.b;
  const size_t slot = (size_t(sequence) * shape.Hkv + item.h) * shape.S + item.first;
  const size_t angle = sequence * shape.table_stride + size_t(item.length) * (shape.R / 2);
  const unsigned char* const past = (lane ? in.v_cache : in.k_cache) + slot * ROW;
  if (lane < 2 && there > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0],%1;" ::"l"(past), "r"(there * ROW) : "memory");
  const T* const row = lane < 8 ? in.q_norm : lane < 16 ? in.k_norm : lane < 24 ? in.cos + angle : in.sin + angle;
  const int at = lane % 8 * 64, end = lane < 16 ? shape.D : shape.T * shape.R / 2;  // elements: `at` begins a line of 128 bytes
  if (at < end) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + at) : "memory");
#endif
}

__device__ inline void add_scaled(float4& o, float factor, float4 x) {
  o.x = fmaf(factor, x.x, o.x), o.y = fmaf(factor, x.y, o.y), o.z = fmaf(factor, x.z, o.z), o.w = fmaf(factor, x.w, o.w);
}

// factors[row,chunk] with which the sums of the chunks add up to the row; a warp of `warps` makes some rows.
__device__ inline void combine_factors(const float2* weights, int stride, int rows, int chunks, float* factors, int warp, int warps, int lane) {
#pragma unroll 1
  for (int row = warp; row < rows; row += warps) {
    float2 w[kMostChunks / 32];
    float top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMostChunks / 32; i++) {
      const int c = i * 32 + lane;
      w[i] = c < chunks ? __ldcg(&weights[size_t(c) * stride + row]) : make_float2(-INFINITY, 0.0f);
      top = fmaxf(top, w[i].x);
    }
#pragma unroll
    for (int far = 16; far; far /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, far));
#pragma unroll
    for (int i = 0; i < kMostChunks / 32; i++) {
      w[i].x = w[i].x == -INFINITY ? 0.0f : power_of_two(w[i].x - top);
      sum += w[i].x * w[i].y;
    }
    const float scale = inverse_of(warp_sum(sum));
#pragma unroll
    for (int i = 0; i < kMostChunks / 32; i++)
      if (i * 32 + lane < chunks) factors[row * chunks + i * 32 + lane] = w[i].x * scale;
  }
}

// Four values of N rows each: the sums over the chunks, whose sums are STRIDE float4 apart, in their order.
template <int STRIDE, int N>
__device__ inline void combine(float4 (&o)[N], const float4* const (&parts)[N], const float* const (&factors)[N], int chunks) {
  constexpr int kTogether = 8;  // of a row, loads on their way
#pragma unroll
  for (int n = 0; n < N; n++) o[n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
  for (int c = 0; c < chunks; c += kTogether) {
    float4 part[N][kTogether];
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int i = 0; i < kTogether; i++) part[n][i] = __ldcg(parts[n] + size_t(min(c + i, chunks - 1)) * STRIDE);
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int i = 0; i < kTogether; i++) add_scaled(o[n], c + i < chunks ? factors[n][c + i] : 0.0f, part[n][i]);
    }
  }
}

}  // namespace qwen
