// How attention_few shares its work: the chunks of sequences, the items of blocks, and what is in shared memory.
#pragma once

#include "attention_cache.cuh"
#include "attention_columns.cuh"

namespace qwen {

constexpr int kMostSequences = 128;  // of a launch
constexpr int kMostChunks = 128, kLeastSlots = 256;  // chunks of a sequence, slots of a chunk
constexpr int kMostFresh = 8;  // new tokens of a call whose rows attention_few makes itself
// Barriers of parts of a block; 0 is that of all of it.
constexpr int kLoadsBarrier = 1, kGroupBarrier = 2;

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

// MW warps share the keys of one tile, each with 8 EIGHTS rows; READERS / MW such groups read different tiles, and each has HALVES halves of
// tiles (keys or values) in shared memory. With MAKERS the kernel makes the rows of the new tokens itself, in one launch.
template <typename Cache, int D, int EIGHTS, int MW, int READERS, int HALVES, int MAKERS>
struct FewLayout {
  static constexpr bool kFresh = MAKERS > 0;
  static constexpr int kThreads = (READERS + MAKERS) * 32;
  static constexpr int kGroups = READERS / MW, kWarpRows = 8 * EIGHTS, kRows = MW * kWarpRows;
  // Rows of bytes become values in memory of their own, which comes first: tiles begin at multiples of a row.
  static constexpr int kRowBytes = kCacheRow<Cache, D>, kHalfBytes = kTileSlots * kRowBytes, kStageBytes = Cache::kPlain ? 0 : kTileSlots * D * 2;
  static constexpr int kStages = kGroups * kStageBytes;
  static constexpr int kPassRows = 16 / kGroups;  // rows whose sums are brought together at a time
  // Rows of one column lie in different banks.
  static constexpr int kStride = D + 8, kMergeStride = D + 4;
  static constexpr int kRingBytes = kStages + kGroups * HALVES * kHalfBytes;
  // A buffer has new queries, keys and values, and later the sums of the groups. While it is read the next one is made.
  static constexpr int kBuffers = kFresh ? 2 : 1;
  static constexpr int kFreshBytes = kFresh ? (kRows * kStride + 2 * kMostFresh * D) * 2 : 0;
  static constexpr int kMergeBytes = 16 * kMergeStride * 4;
  static constexpr int kBufferBytes = ((kFreshBytes > kMergeBytes ? kFreshBytes : kMergeBytes) + 15) / 16 * 16;
  static constexpr int kFactors = kFresh ? 2048 : 4096;  // of rows and chunks
  static constexpr int kShared = kRingBytes + kBuffers * kBufferBytes + kFactors * 4;
  // With the arrays of the kernel.
  static constexpr int kAllShared = kShared + (3 * kMostSequences + 1) * 4 + kGroups * kRows * 12 + (kFresh ? MAKERS * D : 1) * 4 + 16;
};

// a / b for a small a, by 1 / b: exact, and much sooner there.
__device__ inline int divided(int a, float inverse) { return int((float(a) + 0.5f) * inverse); }

// Slots of a chunk of a sequence that has `slots`. A short one is cut into pieces of 256 slots or more, so that it is soon done alone; a long one
// into larger pieces, of which several blocks are busy anyway, since every piece costs some time of its own.
__device__ inline int chunk_slots(const FewPlan& plan, int slots) {
  const int short_ones = divided(slots, 1.0f / kLeastSlots);
  const int wanted = min(short_ones, min(max(8, short_ones / 2), max(32, short_ones / 4))), chunks = max(1, min(plan.most_chunks, wanted));
  return (divided(slots + chunks - 1, inverse_of(float(chunks))) + 31) / 32 * 32;
}

// How the sequences of a launch are cut.
struct FewSequences {
  int starts[kMostSequences + 1];  // items of the sequences before
  int size[kMostSequences], length[kMostSequences];
};

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

// Cuts the sequences; returns the items of all. Lengths were written before the kernels of the call; every warp does the same, so that none
// waits for another.
template <typename T>
__device__ inline int cut_sequences(const AttentionShape& shape, const AttentionTensors<T>& in, const FewPlan& plan, int sequences, FewSequences& cut, int lane) {
  int total = 0;
#pragma unroll 1
  for (int b0 = 0; b0 < sequences; b0 += 32) {
    int count = 0;
    if (b0 + lane < sequences) {
      const int length = length_of(shape, in, b0 + lane), slots = length + shape.T, size = chunk_slots(plan, slots);
      cut.length[b0 + lane] = length, cut.size[b0 + lane] = size;
      count = divided(slots + size - 1, inverse_of(float(size))) * shape.Hkv * plan.blocks;
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

// Four values of a row: the sum over the chunks, whose sums are STRIDE float4 apart, in their order.
template <int STRIDE>
__device__ inline float4 combined(const float* partial, const float* factors, int chunks) {
  const float4* parts = reinterpret_cast<const float4*>(partial);
  float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  constexpr int kTogether = 16;  // loads on their way
#pragma unroll 1
  for (int c = 0; c < chunks; c += kTogether) {
    float4 part[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; i++) part[i] = __ldcg(parts + size_t(min(c + i, chunks - 1)) * STRIDE);
#pragma unroll
    for (int i = 0; i < kTogether; i++) add_scaled(o, c + i < chunks ? factors[c + i] : 0.0f, part[i]);
  }
  return o;
}

}  // namespace qwen
