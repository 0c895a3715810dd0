// The activations of a product of a few rows, as the blocks that multiply keep them: normalized once, in shared memory, in the order in which lanes
// read them. What does not fit there, and has no norm, is read where it is.
#pragma once

#include "device.cuh"
#include "panels.cuh"

namespace qwen {

constexpr int kChunk = 8;                    // activations that a lane reads at a time, 16 bytes
constexpr int kChunkGroup = 32;              // chunks whose squares one warp adds up
constexpr int kUnitChunks = kUnit / kChunk;  // of a unit of 128 k

constexpr int kMostResident = 64 << 10;  // columns: wider products have so many blocks that nothing is left to hide

// `rows` (1, 2, 4, 8: M rounded up) activations of a chunk are neighbors; the exchange lets both the writes, along k, and the reads, along rows,
// find different banks.
template <typename T>
struct FewRows {
  const T* x;     // [M,K]
  uint4* staged;  // [chunks][rows]; null: x is read where it is
  int M, K, log_rows, chunks;

  __host__ __device__ static int groups(int chunks) { return (chunks + kChunkGroup - 1) / kChunkGroup; }
  __host__ __device__ static size_t staged_bytes(int chunks, int log_rows) {
    return (size_t(chunks) * sizeof(uint4) + size_t(groups(chunks)) * sizeof(float)) << log_rows;
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
    if (norm != nullptr) {
#pragma unroll 1
      for (int task = warp; task < tasks; task += warps) {
        const int m = task & ((1 << log_rows) - 1), group = task >> log_rows;
        if (m >= M) continue;
        Pack8<T> p;
        p.bits = load(m, group * kChunkGroup + lane);
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) square += to_float(p.item[i]) * to_float(p.item[i]);
        square = warp_sum(square);
        if (lane == 0) squares[m * all + group] = square;
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int task = warp; task < tasks; task += warps) {
      const int m = task & ((1 << log_rows) - 1), chunk = (task >> log_rows) * kChunkGroup + lane;
      if (m >= M || chunk >= chunks) continue;
      Pack8<T> p;
      p.bits = load(m, chunk);
      if (norm != nullptr && chunk * kChunk < K) {
        float square = 0.0f;
        for (int i = 0; i < all; i++) square += squares[m * all + i];
        const float scale = rsqrtf(square / K + eps);
        Pack8<T> weight;
        weight.bits = task == warp ? weight_bits : *reinterpret_cast<const uint4*>(norm + chunk * kChunk);
#pragma unroll
        for (int i = 0; i < 8; i++) p.item[i] = from_float<T>(to_float(p.item[i]) * scale * to_float(weight.item[i]));
      }
      staged[place(m, chunk)] = p.bits;
    }
    __syncthreads();
  }
};

}  // namespace qwen
