#include "top_logits.cuh"

#include "device.cuh"

namespace qwen {

namespace {

// Parts of a row, at most one per thread of the second kernel.
constexpr int kThreads = 1024, kSmallest = 256;
// Entries that reach the bound and are sorted; more only where very many are equal.
constexpr int kRoom = 4096;

int part_size(int V) {
  const int least = (V + kThreads - 1) / kThreads;
  return least <= kSmallest ? kSmallest : (least + 31) / 32 * 32;
}

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

// best[row,part]: the first entry of each part. One warp per part.
__global__ void part_maxima(const float* __restrict__ logits, uint64_t* __restrict__ best, int V, int size, int parts) {
  wait_for_previous();
  let_next_start();
  const int part = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (part >= parts) return;
  const float* row = logits + size_t(blockIdx.y) * V;
  uint64_t found = 0;
  for (int i = part * size + lane; i < min(V, (part + 1) * size); i += 32) found = larger(found, order(row[i], i));
#pragma unroll
  for (int step = 16; step; step /= 2) found = larger(found, __shfl_xor_sync(0xffffffffu, found, step));
  if (lane == 0) best[size_t(blockIdx.y) * parts + part] = found;
}

// One block per row: the K-th of the parts' maxima is a bound that K entries reach; what reaches it is collected and sorted.
__global__ void __launch_bounds__(kThreads) select(const float* __restrict__ logits, const uint64_t* __restrict__ best, float* values,
                                                   int32_t* ids, int V, int size, int parts, int K) {
  __shared__ uint64_t entries[kRoom];
  __shared__ uint64_t bound;
  __shared__ int count;
  wait_for_previous();
  const int thread = threadIdx.x, lane = thread % 32;
  const float* row = logits + size_t(blockIdx.x) * V;
  const uint64_t own = thread < parts ? best[size_t(blockIdx.x) * parts + thread] : 0;
  entries[thread] = own;
  if (thread == 0) bound = 0, count = 0;
  __syncthreads();
  if (thread < parts && parts >= K) {
    int rank = 0;
    for (int i = 0; i < parts; i++) rank += entries[i] > own;
    if (rank == K - 1) bound = own;
  }
  __syncthreads();
  const uint64_t least = bound;
  __shared__ uint64_t maxima[kThreads];
  maxima[thread] = own;
  __syncthreads();
  for (int part = thread / 32; part < parts; part += kThreads / 32) {
    if (maxima[part] < least) continue;
    for (int i = part * size + lane; i < min(V, (part + 1) * size); i += 32) {
      const uint64_t entry = order(row[i], i);
      if (entry < least) continue;
      const int at = atomicAdd(&count, 1);
      if (at < kRoom) entries[at] = entry;
    }
  }
  __syncthreads();
  const int found = count;
  if (found <= kRoom) {
    int padded = 64;
    while (padded < found) padded *= 2;
    for (int i = found + thread; i < padded; i += kThreads) entries[i] = 0;
    __syncthreads();
    // Bitonic sort, larger first.
    for (int span = 2; span <= padded; span *= 2)
      for (int step = span / 2; step; step /= 2) {
        for (int i = thread; i < padded; i += kThreads) {
          const int other = i ^ step;
          if (other > i) {
            const uint64_t a = entries[i], b = entries[other];
            if ((a < b) == ((i & span) == 0)) entries[i] = b, entries[other] = a;
          }
        }
        __syncthreads();
      }
  } else {
    // No bound, because there are few parts: the largest below the last one, K times.
    uint64_t last = ~uint64_t(0);
    for (int k = 0; k < K; k++) {
      uint64_t mine = 0;
      for (int i = thread; i < V; i += kThreads) {
        const uint64_t entry = order(row[i], i);
        if (entry < last) mine = larger(mine, entry);
      }
      maxima[thread] = mine;
      __syncthreads();
      for (int step = kThreads / 2; step; step /= 2) {
        if (thread < step) maxima[thread] = larger(maxima[thread], maxima[thread + step]);
        __syncthreads();
      }
      last = maxima[0];
      if (thread == 0) entries[k] = last;
      __syncthreads();
    }
  }
  for (int k = thread; k < K; k += kThreads) {
    const int id = id_of(entries[k]);
    ids[size_t(blockIdx.x) * K + k] = id;
    values[size_t(blockIdx.x) * K + k] = row[id];
  }
  let_next_start();
}

}  // namespace

size_t top_logits_scratch(int rows, int V) {
  const int size = part_size(V);
  return sizeof(uint64_t) * rows * ((V + size - 1) / size);
}

void top_logits(const float* logits, float* values, int32_t* ids, int rows, int V, int K, void* scratch, cudaStream_t stream) {
  const int size = part_size(V), parts = (V + size - 1) / size;
  uint64_t* best = static_cast<uint64_t*>(scratch);
  launch(part_maxima, dim3((parts + 7) / 8, rows), dim3(256), 0, stream, logits, best, V, size, parts);
  launch(select, dim3(rows), dim3(kThreads), 0, stream, logits, best, values, ids, V, size, parts, K);
}

}  // namespace qwen
