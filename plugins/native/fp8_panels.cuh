// Panels of FP8 matrices, for the resident products (resident_few.cuh). fp8_stream.cuh says how codes become the operands of the tensor cores.
#pragma once

#include "few_rows.cuh"
#include "fp8_stream.cuh"

namespace qwen {

template <typename T>
struct Fp8Panels {
  using Element = T;
  using Matrix = Fp8Matrix;
  static constexpr int kUnitK = kUnit, kCodes = kPanelRows * kUnit;

  static bool chosen(int N, int) { return N > 8192 && N <= kMostResident; }

  __host__ __device__ static int unit_bytes(const Matrix&) { return kCodes + kPanelRows * int(sizeof(float)); }

  const Matrix& w;
  const int bytes, stride, scale_stride, lane, g, t;

  __device__ explicit Fp8Panels(const Matrix& w)
      : w(w), bytes(unit_bytes(w)), stride(w.stride()), scale_stride(w.scale_stride()), lane(threadIdx.x % 32), g(lane / 4), t(lane % 4) {}

  // Where 16 k of a row are. Rows 2g of two neighboring g are read together.
  __device__ static int place(int row, int piece) { return row * kUnit + (piece ^ (row / 2 % 2 * 4)) * 16; }

  __device__ void fetch(int first, int unit, uint8_t* into) const {
    const int piece = lane % 8, k = unit * kUnit + piece * 16;
    const bool there = k < stride;
#pragma unroll
    for (int i = 0; i < kPanelRows / 4; i++) {
      const int row = i * 4 + lane / 8;
      copy16_or_zeros(into + place(row, piece), w.codes + int64_t(min(first + row, w.N - 1)) * stride + (there ? k : 0), there);
    }
    if (lane < kPanelRows) copy4(into + kCodes + lane * 4, w.scales + int64_t(min(first + lane, w.N - 1) >> w.log_rows) * scale_stride + unit);
  }

  __device__ void multiply_unit(const uint8_t* buffer, int unit, const FewRows<T>& rows, float (&sum)[4]) const {
    uint4 parts[2][2];
    rows.read(g, unit * kUnitChunks + t * 2, 8, parts[0]);
    rows.read(g, unit * kUnitChunks + t * 2 + 1, 8, parts[1]);
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int step = 0; step < 2; step++) {
      const uint4 low = parts[0][step], high = parts[1][step];
      const uint32_t x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const uint4 even = *reinterpret_cast<const uint4*>(buffer + place(2 * g, step * 4 + t));
      const uint4 odd = *reinterpret_cast<const uint4*>(buffer + place(2 * g + 1, step * 4 + t));
      const uint32_t v[4] = {even.x, even.y, even.z, even.w}, o[4] = {odd.x, odd.y, odd.z, odd.w};
#pragma unroll
      for (int i = 0; i < 4; i++)
        multiply<T>(c, fp8_pair<T, false>(v[i]), fp8_pair<T, false>(o[i]), fp8_pair<T, true>(v[i]), fp8_pair<T, true>(o[i]), x[2 * i], x[2 * i + 1]);
    }
    const float2 scale = *reinterpret_cast<const float2*>(buffer + kCodes + 8 * g);
    sum[0] += c[0] * scale.x, sum[1] += c[1] * scale.x;
    sum[2] += c[2] * scale.y, sum[3] += c[3] * scale.y;
  }
};

}  // namespace qwen
