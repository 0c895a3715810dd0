// How attention_few shares its work: the chunks of sequences, the items of blocks, and what is in shared memory.
#pragma once

#include "attention_cache.cuh"
#include "attention_columns.cuh"

namespace qwen {

constexpr int kMostSequences = 128;  // of a launch
constexpr int kMostChunks = 128, kLeastSlots = 256;  // chunks of a sequence, slots of a chunk
constexpr int kCutSlots = 32;  // a sequence is cut at multiples, which are whole tiles
constexpr int kMostFresh = 8;  // new tokens of a call whose rows attention_few makes itself
constexpr int kEight = 8;      // rows of a warp
constexpr int kTabled = 16;    // items of a block that are worked out together
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

// How the sequences of a launch are cut: by their own lengths alone.
struct FewSequences {
  int starts[kMostSequences + 1];  // chunks of the kv heads of the sequences before
  int chunks[kMostSequences], length[kMostSequences];
};

// Slices of the values of a sequence and head that a block adds up: first, first + step, ...
struct FewShare {
  int first, step;
};

constexpr int larger(int a, int b) { return a > b ? a : b; }

// What adding up chunks has in shared memory: sums of a thread, with the largest score and the sum of weights.
template <int THREADS>
constexpr int few_sum_bytes = THREADS * int(sizeof(float4) + sizeof(float2));

// MW warps share the keys of one tile of SLOTS slots, each with 8 rows, or all with the same 8. WARPS / MW such groups read different tiles, and each
// has HALVES halves of tiles (keys or values) in shared memory. With FRESH the kernel makes the rows of the new tokens itself, in one launch.
template <typename Cache, int D, int MW, int WARPS, int SLOTS, int HALVES, bool FRESH>
struct FewLayout {
  static constexpr int kThreads = WARPS * 32;
  static constexpr int kGroups = WARPS / MW, kRows = MW * kEight;
  // Whether a block may have eight rows, which all warps of a group have.
  static constexpr bool kMayShare = FRESH && MW > 1 && D / 16 >= MW;
  static constexpr int kParts = kMayShare ? MW : 1;  // of the values of a row, then
  // Rows of bytes become values in memory of their own, which comes first: tiles begin at multiples of a row.
  static constexpr int kRowBytes = kCacheRow<Cache, D>, kHalfBytes = SLOTS * kRowBytes, kStageBytes = Cache::kPlain ? 0 : SLOTS * D * 2;
  static constexpr int kStages = kGroups * kStageBytes;
  static constexpr int kStride = D + 8;  // rows of one column lie in different banks
  static constexpr int kRingBytes = kStages + kGroups * HALVES * kHalfBytes;
  // New queries, keys and values; later sums of chunks.
  static constexpr int kFreshBytes = FRESH ? (kRows * kStride + 2 * kMostFresh * D) * 2 : 0, kSumBytes = few_sum_bytes<kThreads>;
  // Scores that the warps of a group tell each other: of 16 slots in a row of 32 lanes.
  static constexpr int kScoresAt = larger(kFreshBytes, kSumBytes), kScores = kMayShare && SLOTS > 16 ? kGroups * (SLOTS / 16) * 32 * int(sizeof(float4)) : 0;
  static constexpr int kShared = kRingBytes + kScoresAt + kScores;
  static_assert((Cache::kPlain ? kHalfBytes : kStageBytes) >= kEight * D * 4, "sums of eight rows take the place of a half tile of values");
};

// a / b for a small a, by 1 / b: exact, and much sooner there.
__device__ inline int divided(int a, float inverse) { return int((float(a) + 0.5f) * inverse); }

// Chunks of a sequence that has `slots`. A short one is cut into pieces of 256 slots or more, so that it is soon done alone; a long one into larger
// pieces, of which several blocks are busy anyway, since every piece costs some time of its own.
__device__ inline int chunks_of(const FewPlan& plan, int slots) {
  const int short_ones = slots / kLeastSlots, wanted = min(short_ones, min(max(8, short_ones / 2), max(32, short_ones / 4)));
  return max(1, min(plan.most_chunks, wanted));
}

// What one block does at a time: a chunk of a sequence, for a kv head and a block of rows.
struct FewItem {
  int b, h, block, chunk, chunks, length;
  int first, slots;  // the slots that the rows see, from `first` on

  static __device__ FewItem of(int id, const FewPlan& plan, int T, const FewSequences& cut, int sequences, int rows) {
    FewItem item;
    const int place = divided(id, plan.per_block);
    int low = 0, high = sequences;  // the sequence with starts[low] <= place < starts[high]
#pragma unroll 1
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (cut.starts[middle] <= place ? low : high) = middle;
    }
    item.b = low, item.length = cut.length[low], item.chunks = cut.chunks[low];
    item.block = id - place * plan.blocks;
    const int rest = place - cut.starts[low];
    const float per_chunk = inverse_of(float(item.chunks));
    item.h = divided(rest, per_chunk);
    item.chunk = rest - item.h * item.chunks;
    // The first chunks have a unit more than the others.
    const int units = (item.length + T + kCutSlots - 1) / kCutSlots, each = divided(units, per_chunk), more = units - each * item.chunks;
    item.first = (item.chunk * each + min(item.chunk, more)) * kCutSlots;
    const int size = (each + (item.chunk < more ? 1 : 0)) * kCutSlots;
    const int seen = item.length + min(divided(item.block * rows + rows - 1, plan.per_head), T - 1) + 1;
    item.slots = max(0, min(size, seen - item.first));
    return item;
  }
};

// Where the warps of a block meet.
template <int WARPS>
struct FewMeeting {
  FewSequences cut;
  FewItem items[kTabled];  // the first of the block
  float2 weights[WARPS * kEight];  // of groups and rows: largest score, sum
  float factors[WARPS * kEight];
  int merge_at[WARPS];  // of groups
  FewShare share;
};

template <int WARPS>
constexpr int kOwnShared = int(sizeof(FewMeeting<WARPS>));

// Cuts the sequences. Lengths were written before the kernels of the call; every warp does the same, so that none waits for another.
template <typename T>
__device__ inline void cut_sequences(const AttentionShape& shape, const AttentionTensors<T>& in, const FewPlan& plan, int first_sequence, int sequences,
                                     FewSequences& cut, int lane) {
  int total = 0;
#pragma unroll 1
  for (int b0 = 0; b0 < sequences; b0 += 32) {
    int count = 0;
    if (b0 + lane < sequences) {
      const int length = length_of(shape, in, first_sequence + b0 + lane), chunks = chunks_of(plan, length + shape.T);
      cut.length[b0 + lane] = length, cut.chunks[b0 + lane] = chunks;
      count = chunks * shape.Hkv;
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

}  // namespace qwen
