// The rows that attention begins with: norm and rotation of a head's query or key.
#pragma once

#include "attention.cuh"
#include "device.cuh"

namespace qwen {

// The part of a row of D values that one lane of a warp has.
template <typename T, int D>
struct alignas(D / 32 * sizeof(T)) LaneRow {
  static constexpr int kItems = D / 32;
  T item[kItems];

  static __device__ LaneRow of(const T* row, int lane) { return reinterpret_cast<const LaneRow*>(row)[lane]; }
  __device__ void store(T* row, int lane) const { reinterpret_cast<LaneRow*>(row)[lane] = *this; }
};

// What a lane needs to turn its part of a row: independent of the row, so that it can be loaded before. R is a multiple of D / 16: what a lane
// has turns with what one other lane has.
template <typename T, int D>
struct Turn {
  LaneRow<T, D> norm, cos, sin;

  // `angle` is the row's place in the tables.
  static __device__ Turn of(const T* norm, const T* cos, const T* sin, size_t angle, int R, int lane) {
    Turn turn;
    turn.norm = LaneRow<T, D>::of(norm, lane);
    const int half = R / 2, d = lane * LaneRow<T, D>::kItems, j = d < half ? d : d - half;
    const size_t place = angle + (d < R ? j : 0);
    turn.cos = LaneRow<T, D>::of(cos + place, 0), turn.sin = LaneRow<T, D>::of(sin + place, 0);
    return turn;
  }

  // rotate(rms_norm(row)) of a warp's row, in fp32 and rounded once.
  __device__ LaneRow<T, D> operator()(LaneRow<T, D> row, int R, float eps, int lane) const {
    constexpr int kItems = LaneRow<T, D>::kItems;
    float squares = 0.0f, x[kItems];
#pragma unroll
    for (int i = 0; i < kItems; i++) squares += to_float(row.item[i]) * to_float(row.item[i]);
    const float scale = rsqrtf(warp_sum(squares) / D + eps);
#pragma unroll
    for (int i = 0; i < kItems; i++) x[i] = to_float(row.item[i]) * scale * to_float(norm.item[i]);
    const int half = R / 2 / kItems, other = lane < half ? lane + half : lane - half;  // lanes
    const float sign = lane < half ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      const float y = __shfl_sync(0xffffffffu, x[i], other);
      if (lane < 2 * half) x[i] = x[i] * to_float(cos.item[i]) + sign * y * to_float(sin.item[i]);
    }
#pragma unroll
    for (int i = 0; i < kItems; i++) row.item[i] = from_float<T>(x[i]);
    return row;
  }
};

}  // namespace qwen
