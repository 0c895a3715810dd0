// Parts of products of a few rows that one block makes: panels of a quantized matrix, or rows of an ordinary one. Weights are on their way from the
// moment at which a tile is made or started, so before the rows are known; `run` ends with sums that all threads of the block see.
#pragma once

#include "mma.cuh"
#include "quant_panels.cuh"
#include "warp_ring.cuh"

namespace qwen {

// A warp's sums of a panel for [rows][16]: sum[0], [1] are row 2g of the panel with activation rows 2t, 2t+1; sum[2], [3] row 2g+1.
__device__ inline void put_sums(const float (&sum)[4], float* into, int log_rows) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (2 * t + i < 1 << log_rows) *reinterpret_cast<float2*>(into + (2 * t + i) * kPanelRows + 2 * g) = make_float2(sum[i], sum[2 + i]);
  }
}

// COUNT neighboring panels from row `first` of the matrix on; GATED: half of them, and as many from row first + gates on. No panel begins behind row
// `last`. The warps share the units of each panel. STAGES: units of a panel that a warp has on their way. The code is short: kernels of this length are over
// before long code has been fetched.
template <typename Panels, int WARPS, int STAGES, int COUNT, bool GATED>
struct PanelsTile {
  const Panels& panels;
  WarpRing<STAGES> ring;
  const int first, gates, last, units;  // units: that this warp has of a panel
  const int warp = threadIdx.x / 32;

  static __host__ __device__ int ring_bytes(int unit_bytes) { return WARPS * STAGES * unit_bytes; }
  static __host__ __device__ int sums_bytes(int log_rows) { return int(sizeof(float)) * COUNT * WARPS * kPanelRows << log_rows; }

  __device__ PanelsTile(const Panels& panels, uint8_t* memory, int first, int gates, int last, int all_units)
      : panels(panels),
        ring{memory + int(threadIdx.x / 32) * STAGES * panels.bytes, panels.bytes, COUNT * ((all_units - int(threadIdx.x / 32) + WARPS - 1) / WARPS)},
        first(first),
        gates(gates),
        last(last),
        units(ring.count / COUNT) {}

  __device__ void start() {
    ring.start([&](int i, uint8_t* into) { fetch(i, into); });
  }

  template <typename T>
  __device__ void run(const FewRows<T>& rows, float* sums) {
#pragma unroll 1
    for (int p = 0; p < COUNT; p++) {
      float sum[4] = {};
#pragma unroll 1
      for (int i = 0; i < units; i++)
        ring.next([&](int i, uint8_t* into) { fetch(i, into); }, [&](const uint8_t* from) { panels.multiply_unit(from, warp + i * WARPS, rows, sum); });
      put_sums(sum, sums + ((p * WARPS + warp) << (rows.log_rows + 4)), rows.log_rows);
    }
    __syncthreads();
  }

  // Of panel p the value `at`: 16 times the activation row, plus the row of the panel.
  __device__ static float total(const float* sums, int log_rows, int p, int at) {
    float value = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) value += sums[((p * WARPS + i) << (log_rows + 4)) + at];
    return value;
  }

 private:
  __device__ void fetch(int, uint8_t* into) {
    if (fetched_units_ == units) fetched_units_ = 0, fetched_panels_++;
    const int row = GATED && fetched_panels_ >= COUNT / 2 ? first + gates + (fetched_panels_ - COUNT / 2) * kPanelRows : first + fetched_panels_ * kPanelRows;
    panels.fetch(min(row, last), warp + fetched_units_++ * WARPS, into);
  }

  int fetched_units_ = 0, fetched_panels_ = 0;
};

// Up to 8 rows of an ordinary matrix [count,K].
template <typename T, int WARPS, int LOADS>
struct RowsTile {
  static constexpr int kRows = 8;
  const T* const row;  // of this lane, null where there is none
  const int K, warp = threadIdx.x / 32, t = threadIdx.x % 4;
  uint4 now[LOADS];  // on their way at a time

  __device__ RowsTile(const T* rows, int count, int K)
      : row(int(threadIdx.x % 32 / 4) < count ? rows + size_t(threadIdx.x % 32 / 4) * K : nullptr), K(K) {
    load(0);
  }

  __device__ int step(int group, int i) const { return (group * LOADS + i) * WARPS + warp; }

  __device__ void load(int group) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const int k = step(group, i) * kStep + t * kChunk;
      now[i] = row != nullptr && k < K ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
    }
  }

  __device__ void run(const FewRows<T>& rows, float* sums) {
    float sum[4] = {};
    const int g = threadIdx.x % 32 / 4, log_sums = rows.log_rows + 3;
#pragma unroll 1
    for (int group = 0; step(group, 0) * kStep < K; group++) {
      if (group > 0) load(group);
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        if (step(group, i) * kStep >= K) break;
        uint4 x[1];
        rows.read(g, step(group, i) * (kStep / kChunk) + t, 1, x);
        multiply<T>(sum, now[i].x, 0, now[i].y, 0, x[0].x, x[0].y);
        multiply<T>(sum, now[i].z, 0, now[i].w, 0, x[0].z, x[0].w);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (2 * t + i < 1 << rows.log_rows) sums[(warp << log_sums) + (2 * t + i) * kRows + g] = sum[i];
    }
    __syncthreads();
  }

  // The value `at`: 8 times the activation row, plus the row of the matrix.
  __device__ static float total(const float* sums, int log_rows, int at) {
    float value = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) value += sums[(i << (log_rows + 3)) + at];
    return value;
  }
};

}  // namespace qwen
