// The activations of a product of a few rows with 4-bit matrices, as BiasedCodes multiplies them: normalized once by each block, in shared memory, arranged,
// with the excess of each block. The number of rows is known when this is compiled, so a lane reads all of a unit from one address.
#pragma once

#include "biased_codes.cuh"
#include "few_rows.cuh"

namespace qwen {

// K a multiple of 128. 1 << LOG_ROWS is M rounded up.
template <typename T, int LOG_ROWS>
struct BiasedRows {
  static constexpr int log_rows = LOG_ROWS, kRows = 1 << LOG_ROWS;
  static constexpr int kTogether = LOG_ROWS > 2 ? 4 : kRows;  // groups of chunks that a warp loads before it uses the first

  const T* const x;     // [M,K]
  uint4* const staged;  // [chunks][rows], then the excesses [blocks][rows] and the squares [rows][groups]
  const int M, K, chunks;

  __device__ BiasedRows(const T* x, uint4* staged, int M, int K, int, int chunks) : x(x), staged(staged), M(M), K(K), chunks(chunks) {}

  // Four at a time are read when they are added up: the last ones may have no chunks.
  __host__ __device__ static int groups(int chunks) { return (chunks + 4 * kChunkGroup - 1) / (4 * kChunkGroup) * 4; }
  __host__ __device__ static int blocks(int chunks) { return chunks / (kBiasedBlock / kChunk); }
  // A multiple of 16.
  __host__ __device__ static size_t staged_bytes(int chunks, int) {
    return (size_t(chunks) << LOG_ROWS) * sizeof(uint4) + (((blocks(chunks) + groups(chunks)) << LOG_ROWS) + 3) / 4 * 4 * sizeof(float);
  }
  __device__ float* excesses() const { return reinterpret_cast<float*>(staged + (chunks << LOG_ROWS)); }

  // Rows of a chunk are neighbors, exchanged so that reads along rows and writes along k find different banks.
  __device__ static int place(int m, int chunk) { return (chunk << LOG_ROWS) + (m ^ (chunk & (kRows - 1))); }

  // Chunks t, t + 4, ... of a unit, of row g; where there is no row g, of another one: nobody reads that column of the result.
  __device__ void read_unit(int g, int t, int unit, uint4 (&part)[kUnit / kStep]) const {
    constexpr int kChunks = kStep / kChunk;
    const int m = g & (kRows - 1);
#pragma unroll
    for (int step = 0; step < kUnit / kStep; step++)
      part[step] = (staged + (unit * kUnitChunks << LOG_ROWS))[((step * kChunks + t) << LOG_ROWS) + (m ^ (step * kChunks + t & (kRows - 1)))];
  }

  __device__ void read(int g, int first, int, uint4 (&part)[1]) const { part[0] = staged[place(g & (kRows - 1), first)]; }

  // Of the blocks of a unit, for rows 2t and 2t + 1; of a single row only the first counts.
  __device__ void read_excesses(int t, int unit, float2 (&excess)[kUnit / kBiasedBlock]) const {
    const float* at = excesses() + (unit * (kUnit / kBiasedBlock) << LOG_ROWS);
    if constexpr (LOG_ROWS == 0) {
      const float4 all = *reinterpret_cast<const float4*>(at);
      excess[0].x = all.x, excess[1].x = all.y, excess[2].x = all.z, excess[3].x = all.w;
#pragma unroll
      for (auto& both : excess) both.y = 0.0f;
    } else {
#pragma unroll
      for (int block = 0; block < kUnit / kBiasedBlock; block++) excess[block] = *reinterpret_cast<const float2*>(at + (block << LOG_ROWS) + (2 * t & (kRows - 1)));
    }
  }

  // Eight activations of each lane, neighboring chunks of a row. All lanes of the warp; those from `chunks` on have none.
  __device__ void put(int m, int chunk, const Pack8<T>& value) const {
    const float excess = BiasedCodes<T>::excess_of(value);
    if (chunk >= chunks) return;
    staged[place(m, chunk)] = BiasedCodes<T>::arranged(value.bits);
    if (chunk % (kBiasedBlock / kChunk) == 0) excesses()[(chunk / (kBiasedBlock / kChunk) << LOG_ROWS) + m] = excess;
  }

  // The weight of the norm that this thread needs first. Weights do not depend on the previous kernel.
  __device__ uint4 first_weight(const T* norm) const {
    const int chunk = (threadIdx.x / 32 >> LOG_ROWS) * kChunkGroup + threadIdx.x % 32;
    return norm != nullptr && chunk < chunks ? *reinterpret_cast<const uint4*>(norm + chunk * kChunk) : make_uint4(0, 0, 0, 0);
  }

  // All warps of the block. The squares of a row are summed in an order that depends on K only.
  __device__ void stage(const T* norm, uint4 first_weight, float eps) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, all = groups(chunks), tasks = all << LOG_ROWS;
    float* const squares = excesses() + (blocks(chunks) << LOG_ROWS);
    const bool at_once = tasks <= warps * kTogether;
    const int own = warp & (kRows - 1);  // the row of all tasks of a warp: the number of warps is a multiple of the rows
    Pack8<T> values[kTogether];
    const auto load = [&](int first) {
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int task = first + i * warps, chunk = (task >> LOG_ROWS) * kChunkGroup + lane;
        values[i].bits = task < tasks && own < M && chunk < chunks ? *reinterpret_cast<const uint4*>(x + size_t(own) * K + chunk * kChunk) : make_uint4(0, 0, 0, 0);
      }
    };
    if (norm != nullptr) {
#pragma unroll 1
      for (int first = warp; first < tasks; first += warps * kTogether) {
        load(first);
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
          const int task = first + i * warps;
          if (task >= tasks) break;
          float square = 0.0f;
#pragma unroll
          for (int j = 0; j < 8; j++) square += to_float(values[i].item[j]) * to_float(values[i].item[j]);
          square = warp_sum(square);
          if (lane == 0) squares[own * all + (task >> LOG_ROWS)] = square;
        }
      }
      __syncthreads();
    }
    float scale = 0.0f;
    if (norm != nullptr) {
#pragma unroll 1
      for (int j = 0; j < all; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(squares + own * all + j);
        scale += (four.x + four.y) + (four.z + four.w);
      }
      scale = rsqrtf(__fdividef(scale, float(K)) + eps);
    }
#pragma unroll 1
    for (int first = warp; first < tasks; first += warps * kTogether) {
      if (norm == nullptr || !at_once) load(first);
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int task = first + i * warps, chunk = (task >> LOG_ROWS) * kChunkGroup + lane;
        if (task >= tasks) break;
        if (norm != nullptr) {
          Pack8<T> weight;
          weight.bits = first_weight;
          if (task != warp && chunk < chunks) weight.bits = *reinterpret_cast<const uint4*>(norm + chunk * kChunk);
#pragma unroll
          for (int j = 0; j < 8; j++) values[i].item[j] = from_float<T>(to_float(values[i].item[j]) * scale * to_float(weight.item[j]));
        }
        put(own, chunk, values[i]);
      }
    }
    __syncthreads();
  }
};

}  // namespace qwen
