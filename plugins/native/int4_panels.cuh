// Panels of the usual 4-bit matrices: blocks of 32, scales in fp16, no zeros, K a multiple of 128. A unit is a group of blocks with its scales, which
// lies in one piece. A step of a mixture waits for instructions more than for memory, so this has as few as it takes.
#pragma once

#include "biased_rows.cuh"
#include "quant.cuh"

namespace qwen {

template <typename T, int LOG_ROWS>
struct Int4Panels {
  using Element = T;
  using Matrix = QuantMatrix;
  using Rows = BiasedRows<T, LOG_ROWS>;
  using OfOneRow = Int4Panels<T, 0>;
  static constexpr bool kTogether = LOG_ROWS > 0;  // a single row is read at no cost, and shorter code is faster
  static constexpr int kBits = 4, kScales = kGroupBlocks * kPanelRows * 2, bytes = kScales + kUnit * kPanelRows / 2;
  static_assert(kGroupBlocks * kBiasedBlock == kUnit);

  __host__ __device__ static int unit_bytes(const Matrix&) { return bytes; }
  static bool takes(const QuantMatrix& w) { return w.bits == 4 && w.block == kBiasedBlock && !w.zeros && !w.wide_scales && w.K % kUnit == 0; }

  const uint8_t* const packed;  // of this lane
  const int panel_bytes;

  __device__ explicit Int4Panels(const Matrix& w) : packed(w.packed + threadIdx.x % 32 * 16), panel_bytes(w.panel_bytes()) {}

  // Start copying a unit of the panel whose first row is `row`.
  __device__ void fetch(int row, int unit, uint8_t* into) const {
    const int lane = threadIdx.x % 32;
    const uint8_t* from = packed + int64_t(row / kPanelRows) * panel_bytes + unit * bytes;
    into += lane * 16;
    copy16(into, from);
    copy16(into + 512, from + 512);
    if (lane < (bytes - 1024) / 16) copy16(into + 1024, from + 1024);
  }

  // What a lane multiplies with a unit of any panel.
  struct Activations {
    uint4 x[kUnit / kStep];
    float2 excess[kUnit / kStep];
  };
  __device__ void read(const Rows& rows, int unit, Activations& of) const {
    const int lane = threadIdx.x % 32;
    rows.read_unit(lane / 4, lane % 4, unit, of.x);
    rows.read_excesses(lane % 4, unit, of.excess);
  }

  // sum[0], [1]: row 2g of the panel with activation rows 2t, 2t+1; [2], [3]: row 2g+1.
  __device__ void multiply_panel(const uint8_t* buffer, const Activations& with, float (&sum)[4]) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint8_t *scales = buffer + g * 4, *codes = buffer + kScales + t * 64 + g * 8;
#pragma unroll
    for (int step = 0; step < kUnit / kStep; step++) {
      const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(scales + step * kPanelRows * 2)), excess = with.excess[step];
      const uint2 w = *reinterpret_cast<const uint2*>(codes + step * kStep * kPanelRows / 2);
      float c[4] = {};
      BiasedCodes<T>::multiply_block(c, w.x, w.y, with.x[step]);
      sum[0] += (c[0] - excess.x) * scale.x, sum[1] += (c[1] - excess.y) * scale.x;
      sum[2] += (c[2] - excess.x) * scale.y, sum[3] += (c[3] - excess.y) * scale.y;
    }
  }
};

// of(panels) with a null pointer to the kind for M rows.
template <typename T, typename Of>
auto with_int4_panels(int M, const Of& of) {
  if (M == 1) return of(static_cast<Int4Panels<T, 0>*>(nullptr));
  if (M == 2) return of(static_cast<Int4Panels<T, 1>*>(nullptr));
  if (M <= 4) return of(static_cast<Int4Panels<T, 2>*>(nullptr));
  return of(static_cast<Int4Panels<T, 3>*>(nullptr));
}

}  // namespace qwen
