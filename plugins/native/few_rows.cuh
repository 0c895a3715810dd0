// The activations of a product of a few rows, as the blocks that multiply keep them: normalized once, in shared memory, in the order in which lanes
// read them. What does not fit there, and has no norm, is read where it is.
#pragma once

#include "device.cuh"
#include "panels.cuh"

namespace qwen {

constexpr int kChunk = 8;                    // activations that a lane reads at a time, 16 bytes
constexpr int kChunkGroup = 32;              // chunks whose squares one warp adds up
constexpr int kSquaredTogether = 4, kNormalizedTogether = 2;  // groups that a warp loads before it uses the first
constexpr int kUnitChunks = kUnit / kChunk;  // of a unit of 128 k

constexpr int kMostResident = 64 << 10;  // columns: wider products have so many blocks that nothing is left to hide
constexpr int kLongestResident = 1024;   // k: of longer rows resident blocks are faster alone and slower in a step (docs/performance.md)

// `rows` (1, 2, 4, 8: M rounded up) activations of a chunk are neighbors; the exchange lets both the writes, along k, and the reads, along rows,
// find different banks.
template <typename T>
struct FewRows {
  const T* x;     // [M,K]
  uint4* staged;  // [chunks][rows]; null: x is read where it is
  int M, K, log_rows, chunks;

  __host__ __device__ static int groups(int chunks) { return (chunks + kChunkGroup - 1) / kChunkGroup; }
  // A multiple of 16.
  __host__ __device__ static size_t staged_bytes(int chunks, int log_rows) {
    return (size_t(chunks) << log_rows) * sizeof(uint4) + ((size_t(groups(chunks)) << log_rows) + 3) / 4 * 4 * sizeof(float);
  }

  __device__ uint4 load(int m, int chunk) const {
    return chunk * kChunk < K ? *reinterpret_cast<const uint4*>(x + size_t(m) * K + chunk * kChunk) : make_uint4(0, 0, 0, 0);
  }

  __device__ int place(int m, int chunk) const { return (chunk << log_rows) + (m ^ (chunk & ((1 << log_rows) - 1))); }

  // `part[i]` = chunk first + i * step of row g, zeros beyond K. Where there is no row g another one's: nobody reads that column of the result. No
  // load waits for another.
  template <int COUNT>
  __device__ void read(int g, int first, int step, uint4 (&part)[COUNT]) const {
    if (staged != nullptr) {
      const int m = g & ((1 << log_rows) - 1);
#pragma unroll
      for (int i = 0; i < COUNT; i++) part[i] = staged[place(m, first + i * step)];
    } else {
      const uint4* row = reinterpret_cast<const uint4*>(x + size_t(min(g, M - 1)) * K);
#pragma unroll
      for (int i = 0; i < COUNT; i++) part[i] = row[min(first + i * step, K / kChunk - 1)];
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        if ((first + i * step) * kChunk >= K) part[i] = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // Eight activations of each lane, neighboring chunks of a row. Lanes from `chunks` on have none.
  __device__ void put(int m, int chunk, const Pack8<T>& value) const {
    if (chunk < chunks) staged[place(m, chunk)] = value.bits;
  }

  // The weight of the norm that this thread needs first. Weights do not depend on the previous kernel, and were not used since the last step.
  __device__ uint4 first_weight(const T* norm) const {
    const int chunk = (threadIdx.x / 32 >> log_rows) * kChunkGroup + threadIdx.x % 32;
    return norm != nullptr && chunk * kChunk < K ? *reinterpret_cast<const uint4*>(norm + chunk * kChunk) : make_uint4(0, 0, 0, 0);
  }

  // All warps of the block. The squares of a row are summed in an order that depends on K only.
  __device__ void stage(const T* norm, uint4 weight_bits, float eps) const {
    if (staged == nullptr) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, all = groups(chunks), tasks = all << log_rows;
    float* squares = reinterpret_cast<float*>(staged + (size_t(chunks) << log_rows));  // [rows][groups]
    const int m = warp & ((1 << log_rows) - 1);  // the row of all tasks of a warp: the number of warps is a multiple of the rows
    const auto chunk_of = [&](int task) { return (task >> log_rows) * kChunkGroup + lane; };
    const auto exists = [&](int task) { return task < tasks && m < M; };
    if (norm != nullptr) {
      Pack8<T> values[kSquaredTogether];
#pragma unroll 1
      for (int task = warp; task < tasks; task += warps * kSquaredTogether) {
#pragma unroll
        for (int i = 0; i < kSquaredTogether; i++) {
          if (const int own = task + i * warps; exists(own)) values[i].bits = load(m, chunk_of(own));
        }
#pragma unroll
        for (int i = 0; i < kSquaredTogether; i++) {
          const int own = task + i * warps;
          if (!exists(own)) continue;
          float square = 0.0f;
#pragma unroll
          for (int j = 0; j < 8; j++) square += to_float(values[i].item[j]) * to_float(values[i].item[j]);
          square = warp_sum(square);
          if (lane == 0) squares[m * all + (own >> log_rows)] = square;
        }
      }
      __syncthreads();
    }
    float scale = 0.0f;
    if (norm != nullptr) {
#pragma unroll 1
      for (int j = lane; j < all; j += 32) scale += squares[m * all + j];
      scale = rsqrtf(warp_sum(scale) / K + eps);
    }
    Pack8<T> values[kNormalizedTogether], weight[kNormalizedTogether];
#pragma unroll 1
    for (int task = warp; task < tasks; task += warps * kNormalizedTogether) {
#pragma unroll
      for (int i = 0; i < kNormalizedTogether; i++) {
        const int own = task + i * warps, chunk = chunk_of(own);
        if (!exists(own)) continue;
        values[i].bits = load(m, chunk);
        weight[i].bits = own == warp ? weight_bits : make_uint4(0, 0, 0, 0);
        if (norm != nullptr && own != warp && chunk * kChunk < K) weight[i].bits = *reinterpret_cast<const uint4*>(norm + chunk * kChunk);
      }
#pragma unroll
      for (int i = 0; i < kNormalizedTogether; i++) {
        const int own = task + i * warps, chunk = chunk_of(own);
        if (!exists(own)) continue;
        if (norm != nullptr) {
#pragma unroll
          for (int j = 0; j < 8; j++) values[i].item[j] = from_float<T>(to_float(values[i].item[j]) * scale * to_float(weight[i].item[j]));
        }
        put(m, chunk, values[i]);
      }
    }
    __syncthreads();
  }
};

}  // namespace qwen
