#include "top_logits.cuh"

#include <type_traits>

#include "device.cuh"

namespace qwen {

namespace {

// Parts of a row, at most one per thread of the second kernel. With at least K parts few entries reach the bound; rows of fewer parts are short.
constexpr int kThreads = 1024;
// Entries that reach the bound and are sorted; more only where very many are equal.
constexpr int kRoom = 4096;
// So many are put in order by counting those before each, more by sorting.
constexpr int kCounted = 512;
// Leading bits of the bound: sign, exponent and some more.
constexpr int kBoundBits = 20;

int part_size(int V) { return ((V + kThreads - 1) / kThreads + 31) / 32 * 32; }

// Larger numbers are better: by value, NaN above all, then by lower id. 0 is no entry.
__device__ inline uint64_t order(float x, int id) {
  uint32_t bits = __float_as_uint(x);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  // Zeros of both signs are equal.
  if (x == 0.0f) bits = 0x80000000u;
  if (x != x) bits = 0xfffffffeu;  // above infinity, and below what means no bound
  return uint64_t(bits) << 32 | (0xffffffffu - uint32_t(id));
}

__device__ inline int id_of(uint64_t entry) { return static_cast<int>(0xffffffffu - uint32_t(entry)); }

__device__ inline uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

// Bitonic sort by the whole block; n is a power of two. All threads are through when it returns.
__device__ inline void sort_descending(uint64_t* entries, int n) {
  for (int span = 2; span <= n; span *= 2)
    for (int step = span / 2; step; step /= 2) {
      for (int i = threadIdx.x; i < n; i += kThreads) {
        const int other = i ^ step;
        if (other > i) {
          const uint64_t a = entries[i], b = entries[other];
          if ((a < b) == ((i & span) == 0)) entries[i] = b, entries[other] = a;
        }
      }
      __syncthreads();
    }
}

// The first entry of elements start .. end - 1 of a row that this lane reads.
__device__ inline uint64_t first_entry(const float* row, float*, int start, int end, int lane) {
  uint64_t found = 0;
#pragma unroll 8
  for (int i = start + lane; i < end; i += 32) found = larger(found, order(row[i], i));
  return found;
}

// The same of 16 bits; the elements go to `wide`.
template <typename T>
__device__ inline uint64_t first_entry(const T* row, float* wide, int start, int end, int lane) {
  uint64_t found = 0;
  if ((reinterpret_cast<uintptr_t>(row) | reinterpret_cast<uintptr_t>(wide)) % 16 == 0) {  // parts begin at multiples of 32
    for (int i = start + lane * 8; i + 8 <= end; i += 256) {
      Pack8<T> x;
      x.bits = *reinterpret_cast<const uint4*>(row + i);
      float y[8];
#pragma unroll
      for (int j = 0; j < 8; j++) y[j] = to_float(x.item[j]), found = larger(found, order(y[j], i + j));
      *reinterpret_cast<float4*>(wide + i) = make_float4(y[0], y[1], y[2], y[3]);
      *reinterpret_cast<float4*>(wide + i + 4) = make_float4(y[4], y[5], y[6], y[7]);
    }
    start += (end - start) / 8 * 8;
  }
  for (int i = start + lane; i < end; i += 32) {
    const float y = to_float(row[i]);
    wide[i] = y, found = larger(found, order(y, i));
  }
  return found;
}

// best[row,part]: the first entry of each part. One warp per part.
template <typename T>
__global__ void part_maxima(const T* __restrict__ logits, float* __restrict__ wide, uint64_t* __restrict__ best, int V, int size, int parts) {
  wait_for_previous();
  let_next_start();
  const int part = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (part >= parts) return;
  const size_t row = size_t(blockIdx.y) * V;
  uint64_t found = first_entry(logits + row, wide + row, part * size, min(V, (part + 1) * size), lane);
#pragma unroll
  for (int step = 16; step; step /= 2) found = larger(found, __shfl_xor_sync(0xffffffffu, found, step));
  if (lane == 0) best[size_t(blockIdx.y) * parts + part] = found;
}

// One block per row: the K-th of the parts' maxima is a bound that K entries reach; what reaches it is collected and put in order.
__global__ void __launch_bounds__(kThreads) select(const float* __restrict__ logits, const uint64_t* __restrict__ best, float* values,
                                                   int32_t* ids, int V, int size, int parts, int K) {
  __shared__ uint64_t entries[kRoom];
  __shared__ float found_values[kCounted];
  __shared__ int reaching[kThreads];  // parts of which an entry reaches the bound
  __shared__ int reaching_count, count;
  wait_for_previous();
  let_next_start();
  const int thread = threadIdx.x, lane = thread % 32;
  const float* row = logits + size_t(blockIdx.x) * V;
  values += size_t(blockIdx.x) * K, ids += size_t(blockIdx.x) * K;
  if (thread == 0) reaching_count = count = 0;
  // Upper half of the entry: the value alone. Equal values of other ids reach the bound, too.
  const uint32_t mine = thread < parts ? uint32_t(best[size_t(blockIdx.x) * parts + thread] >> 32) : 0;
  // The K-th largest, bit by bit; 0, below every entry, where there are fewer parts. The last bits would keep out few more.
  uint32_t least = 0;
#pragma unroll
  for (int bit = 31; bit >= 32 - kBoundBits; bit--) {
    const uint32_t higher = least | 1u << bit;
    if (__syncthreads_count(mine >= higher) >= K) least = higher;
  }
  if (thread < parts && mine >= least) reaching[atomicAdd(&reaching_count, 1)] = thread;
  __syncthreads();
  // A warp reads two parts at a time, and all it reads of them before it looks at it.
  constexpr int kWarps = kThreads / 32, kTogether = 8;
  for (int at = thread / 32; at < reaching_count; at += 2 * kWarps) {
    const int first[2] = {reaching[at] * size, at + kWarps < reaching_count ? reaching[at + kWarps] * size : V};
    for (int offset = lane; offset < size; offset += 32 * kTogether) {
      float x[2][kTogether];
#pragma unroll
      for (int i = 0; i < 2 * kTogether; i++) {
        const int within = offset + i % kTogether * 32, id = first[i / kTogether] + within;
        x[i / kTogether][i % kTogether] = within < size && id < V ? row[id] : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < 2 * kTogether; i++) {
        const int within = offset + i % kTogether * 32, id = first[i / kTogether] + within;
        const float value = x[i / kTogether][i % kTogether];
        const uint64_t entry = order(value, id);
        if (within >= size || id >= V || uint32_t(entry >> 32) < least) continue;
        const int place = atomicAdd(&count, 1);
        if (place < kRoom) entries[place] = entry;
        if (place < kCounted) found_values[place] = value;
      }
    }
  }
  __syncthreads();
  const int found = count;
  if (found <= kCounted) {
    if (thread < found) {
      const uint64_t entry = entries[thread];
      int before = 0;
#pragma unroll 8
      for (int i = 0; i < found; i++) before += entries[i] > entry;
      if (before < K) ids[before] = id_of(entry), values[before] = found_values[thread];
    }
    return;
  }
  if (found <= kRoom) {
    int padded = kCounted;
    while (padded < found) padded *= 2;
    for (int i = found + thread; i < padded; i += kThreads) entries[i] = 0;
    __syncthreads();
    sort_descending(entries, padded);
  } else {
    // Very many equal ones: the largest below the last one, K times.
    __shared__ uint64_t largest[kThreads];
    uint64_t last = ~uint64_t(0);
    for (int k = 0; k < K; k++) {
      uint64_t next = 0;
      for (int i = thread; i < V; i += kThreads) {
        const uint64_t entry = order(row[i], i);
        if (entry < last) next = larger(next, entry);
      }
      largest[thread] = next;
      __syncthreads();
      for (int step = kThreads / 2; step; step /= 2) {
        if (thread < step) largest[thread] = larger(largest[thread], largest[thread + step]);
        __syncthreads();
      }
      last = largest[0];
      if (thread == 0) entries[k] = last;
      __syncthreads();
    }
  }
  for (int k = thread; k < K; k += kThreads) {
    const int id = id_of(entries[k]);
    ids[k] = id;
    values[k] = row[id];
  }
}

}  // namespace

size_t top_logits_scratch(int rows, int V) {
  const int size = part_size(V);
  return sizeof(uint64_t) * rows * ((V + size - 1) / size);
}

template <typename T>
void top_logits(const T* logits, float* wide, float* values, int32_t* ids, int rows, int V, int K, void* scratch, cudaStream_t stream) {
  const int size = part_size(V), parts = (V + size - 1) / size;
  uint64_t* best = static_cast<uint64_t*>(scratch);
  const float* found;
  if constexpr (std::is_same<T, float>::value)
    found = logits;
  else
    found = wide;
  launch(part_maxima<T>, dim3((parts + 7) / 8, rows), dim3(256), 0, stream, logits, wide, best, V, size, parts);
  launch(select, dim3(rows), dim3(kThreads), 0, stream, found, best, values, ids, V, size, parts, K);
}
template void top_logits(const float*, float*, float*, int32_t*, int, int, int, void*, cudaStream_t);
template void top_logits(const __half*, float*, float*, int32_t*, int, int, int, void*, cudaStream_t);
template void top_logits(const __nv_bfloat16*, float*, float*, int32_t*, int, int, int, void*, cudaStream_t);

}  // namespace qwen
