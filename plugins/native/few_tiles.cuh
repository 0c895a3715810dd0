// Parts of products of a few rows that one block makes: panels of a quantized matrix, or rows of an ordinary one. Weights are on their way from the
// moment at which a tile is made or started, so before the rows are known; `run` ends with sums that all threads of the block see.
#pragma once

#include <type_traits>

#include "int4_panels.cuh"
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
// `last`. The warps share the units of each panel. STAGES: units that a warp has on their way. A warp multiplies a unit of several panels with activations
// that it reads once. The code is short otherwise: kernels of this length are over before long code has been fetched.
template <typename Panels, int WARPS, int STAGES, int COUNT, bool GATED>
struct PanelsTile {
  using Rows = typename Panels::Rows;
  static constexpr int kTogether = !Panels::kTogether ? 1 : COUNT % 3 == 0 ? 3 : COUNT % 2 == 0 ? 2 : 1;  // panels
  static_assert(STAGES % kTogether == 0);

  const Panels& panels;
  const int first, gates, last, warp, units;  // units: that this warp has of a panel
  WarpRing<STAGES / kTogether> ring;

  static __host__ __device__ int ring_bytes(int unit_bytes) { return WARPS * STAGES * unit_bytes; }
  static __host__ __device__ int sums_bytes(int log_rows) { return int(sizeof(float)) * COUNT * WARPS * kPanelRows << log_rows; }

  __device__ PanelsTile(const Panels& panels, uint8_t* memory, int first, int gates, int last, int all_units)
      : panels(panels),
        first(first),
        gates(gates),
        last(last),
        warp(threadIdx.x / 32),
        units((all_units - warp + WARPS - 1) / WARPS),
        ring{memory + warp * STAGES * panels.bytes, kTogether * panels.bytes, COUNT / kTogether * units} {}

  __device__ void start() {
    ring.start([&](int, uint8_t* into) { fetch(into); });
  }

  __device__ void run(const Rows& rows, float* sums) {
#pragma unroll 1
    for (int p = 0; p < COUNT; p += kTogether) {
      float sum[kTogether][4] = {};
#pragma unroll 1
      for (int i = 0; i < units; i++) {
        ring.next([&](int, uint8_t* into) { fetch(into); },
                  [&](const uint8_t* from) {
                    typename Panels::Activations with;
                    panels.read(rows, warp + i * WARPS, with);
#pragma unroll
                    for (int q = 0; q < kTogether; q++) panels.multiply_panel(from + q * panels.bytes, with, sum[q]);
                  });
      }
#pragma unroll
      for (int q = 0; q < kTogether; q++) put_sums(sum[q], sums + (((p + q) * WARPS + warp) << (rows.log_rows + 4)), rows.log_rows);
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
  // A unit of `kTogether` panels, in the order of their use.
  __device__ void fetch(uint8_t* into) {
#pragma unroll 1
    for (int q = 0; q < kTogether; q++, into += panels.bytes) {
      const int p = next_panel_ + q, row = GATED && p >= COUNT / 2 ? first + gates + (p - COUNT / 2) * kPanelRows : first + p * kPanelRows;
      panels.fetch(min(row, last), warp + next_unit_ * WARPS, into);
    }
    if (++next_unit_ == units) next_unit_ = 0, next_panel_ += kTogether;
  }

  int next_panel_ = 0, next_unit_ = 0;
};

// Up to 8 rows of an ordinary matrix [count,K], all of them in shared memory: a lane copies what it will read.
template <typename T, int WARPS>
struct RowsTile {
  static constexpr int kRows = 8;

  uint8_t* const memory;
  const int K, lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  static __host__ __device__ int memory_bytes(int K) { return (K + kStep - 1) / kStep * 32 * 16; }

  __device__ uint8_t* place(int step) const { return memory + (step * 32 + lane) * 16; }

  __device__ void start(const T* rows, int count) const {
    const int k = lane % 4 * kChunk, row = lane / 4;
    const T* from = rows + size_t(min(row, count - 1)) * K + k;
#pragma unroll 1
    for (int step = warp; step * kStep < K; step += WARPS) {
      const bool there = row < count && step * kStep + k < K;
      copy16_or_zeros(place(step), from + (there ? step * kStep : -k), there);
    }
    end_copies();
  }

  template <typename Rows>
  __device__ void run(const Rows& rows, float* sums) const {
    constexpr bool kArranged = !std::is_same<Rows, FewRows<T>>::value;  // then the weights must be, too
    const int g = lane / 4, t = lane % 4, log_sums = rows.log_rows + 3;
    float sum[4] = {};
    await_copies<0>();
#pragma unroll 1
    for (int step = warp; step * kStep < K; step += WARPS) {
      uint4 x[1], w = *reinterpret_cast<const uint4*>(place(step));
      rows.read(g, step * (kStep / kChunk) + t, 1, x);
      if (kArranged) w = BiasedCodes<T>::arranged(w);
      multiply<T>(sum, w.x, 0, w.y, 0, x[0].x, x[0].y);
      multiply<T>(sum, w.z, 0, w.w, 0, x[0].z, x[0].w);
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
