// Panels of 16-bit matrices, for the resident products (resident_few.cuh).
#pragma once

#include "few_rows.cuh"
#include "mma.cuh"

namespace qwen {

// A unit is UNIT k, 32 or 64.
template <typename T, int UNIT>
struct PlainMatrix {
  const T* rows = nullptr;  // [N,K], K a multiple of 8
  int N = 0, K = 0;

  __host__ __device__ int units() const { return (K + UNIT - 1) / UNIT; }
};

template <typename T, int UNIT>
struct PlainPanels {
  using Element = T;
  using Matrix = PlainMatrix<T, UNIT>;
  static constexpr int kUnitK = UNIT, kPieces = UNIT / kChunk;

  static bool chosen(int N, int K) { return N >= K && N <= kMostResident && K <= kLongestResident; }

  __host__ __device__ static int unit_bytes(const Matrix&) { return kPanelRows * UNIT * int(sizeof(T)); }

  const Matrix w;
  const int bytes, lane, g, t;

  __device__ explicit PlainPanels(const Matrix& w) : w(w), bytes(unit_bytes(w)), lane(threadIdx.x % 32), g(lane / 4), t(lane % 4) {}

  // Where 8 k of a row are. Rows 2g of two neighboring g are read together.
  __device__ static int place(int row, int piece) {
    const int odd = row / 2 % 2;
    return UNIT == 64 ? (row * kPieces + (piece ^ odd * 4)) * 16 : ((row ^ odd) * kPieces + piece) * 16;
  }

  __device__ void fetch(int first, int unit, uint8_t* into) const {
    const int piece = lane % kPieces, k = unit * UNIT + piece * kChunk;
    const bool there = k < w.K;
#pragma unroll
    for (int i = 0; i < kPieces / 2; i++) {
      const int row = i * (32 / kPieces) + lane / kPieces;
      copy16_or_zeros(into + place(row, piece), w.rows + int64_t(min(first + row, w.N - 1)) * w.K + (there ? k : 0), there);
    }
  }

  __device__ void multiply_unit(const uint8_t* buffer, int unit, const FewRows<T>& rows, float (&sum)[4]) const {
    uint4 parts[UNIT / kStep];
    rows.read(g, unit * kPieces + t, kStep / kChunk, parts);
#pragma unroll
    for (int step = 0; step < UNIT / kStep; step++) {
      const int piece = step * (kStep / kChunk) + t;
      const uint4 x = parts[step];
      const uint4 a = *reinterpret_cast<const uint4*>(buffer + place(2 * g, piece));
      const uint4 d = *reinterpret_cast<const uint4*>(buffer + place(2 * g + 1, piece));
      multiply<T>(sum, a.x, d.x, a.y, d.y, x.x, x.y);
      multiply<T>(sum, a.z, d.z, a.w, d.w, x.z, x.w);
    }
  }
};

}  // namespace qwen
