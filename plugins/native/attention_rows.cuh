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

// rotate(rms_norm(row)) of a warp's row, in fp32 and rounded once; `angle` is the row's place in cos and sin, `memory` has D floats of this warp.
template <typename T, int D>
__device__ inline LaneRow<T, D> turned(LaneRow<T, D> row, const T* norm, const T* cos, const T* sin, size_t angle, int R, float eps, float* memory, int lane) {
  constexpr int kItems = LaneRow<T, D>::kItems;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; i++) squares += to_float(row.item[i]) * to_float(row.item[i]);
  const float scale = rsqrtf(warp_sum(squares) / D + eps);
  float x[kItems];
#pragma unroll
  for (int i = 0; i < kItems; i++) memory[lane * kItems + i] = x[i] = to_float(row.item[i]) * scale * to_float(norm[lane * kItems + i]);
  __syncwarp();
  const int half = R / 2;
#pragma unroll
  for (int i = 0; i < kItems; i++) {
    const int d = lane * kItems + i;
    if (d < R) {
      const int j = d < half ? d : d - half;
      const float other = d < half ? -memory[d + half] : memory[j];
      x[i] = x[i] * to_float(cos[angle + j]) + other * to_float(sin[angle + j]);
    }
    row.item[i] = from_float<T>(x[i]);
  }
  __syncwarp();
  return row;
}

}  // namespace qwen
