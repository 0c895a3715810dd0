// The inner loop of products with FP8 matrices: one warp multiplies parts of panels of 16 weight rows with up to 8 rows of activations. As
// quant_stream.cuh, with two differences. Codes are stored row after row, so a lane takes 16 neighboring k of two neighboring rows, and the
// copies exchange 16-byte pieces in shared memory so that lanes find theirs in different banks. And a unit of work is what has one scale.
//
// An E4M3 code is a number that fp16 and bf16 hold exactly; products are summed in fp32 over 128 k, and the sum is multiplied by the scale.
#pragma once

#include <type_traits>

#include "fp8.cuh"
#include "mma.cuh"
#include "panels.cuh"

namespace qwen {

// Two codes, in the low or the high half of a word, as a pair of T. In bits 15 to 8 of its half a code has sign, exponent and mantissa in the
// places of T but for a shift of the last two; what is left is a power of two between their exponents' biases.
template <typename T, bool HIGH>
__device__ inline uint32_t fp8_pair(uint32_t word) {
  constexpr bool kHalf = std::is_same<T, __half>::value;
#if __CUDA_ARCH__ >= 890
  constexpr bool kConverts = kHalf;
#else
  constexpr bool kConverts = false;
#endif
  if constexpr (kConverts) {
    uint32_t pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(uint16_t(HIGH ? word >> 16 : word)));
    return pair;
  } else {
    using Two = std::conditional_t<kHalf, __half2, __nv_bfloat162>;
    const uint32_t wide = __byte_perm(word, 0, HIGH ? 0x3424 : 0x1404);
    const uint32_t bits = (wide & 0x80008000u) | ((wide & 0x7F007F00u) >> (kHalf ? 1 : 4));
    const uint32_t factor = kHalf ? 0x5C005C00u : 0x7B807B80u;  // 2^8, 2^120
    const Two pair = __hmul2(*reinterpret_cast<const Two*>(&bits), *reinterpret_cast<const Two*>(&factor));
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

template <typename T, int PANELS>
struct Fp8Stream {
  using Matrix = Fp8Matrix;
  static constexpr int kPanels = PANELS, kStages = 2, kRegisters = PANELS == 1 ? 64 : 128;
  struct Buffer {
    uint8_t codes[kPanelRows * kUnit];  // [16][128], pieces of 16 exchanged
    float scales[kPanelRows];
  };
  static constexpr size_t kBytesPerWarp = sizeof(Buffer) * PANELS * kStages;
  static_assert(kUnit == kScaleColumns, "a unit has one scale");

  const int N, stride, scale_stride, log_rows, unit_count;
  Buffer* const ring;  // of this warp, [kStages][PANELS]
  const int lane, g, t;

  __device__ Fp8Stream(const Matrix& w, void* shared, int warp)
      : N(w.N),
        stride(w.stride()),
        scale_stride(w.scale_stride()),
        log_rows(w.log_rows),
        unit_count(w.units()),
        ring(reinterpret_cast<Buffer*>(static_cast<char*>(shared) + warp * kBytesPerWarp)),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4) {}

  __device__ int units() const { return unit_count; }

  // Where piece `piece` (16 k) of row `row` of a unit is. Rows 2g of two neighboring g are read together.
  __device__ static int place(int row, int piece) { return row * kUnit + (piece ^ (row / 2 % 2 * 4)) * 16; }

  // Start copying unit `unit` of a panel.
  __device__ void fetch(const Fp8Panel& panel, int unit, Buffer& into) const {
    const int piece = lane % 8, k = unit * kUnit + piece * 16;
    const bool there = k < stride;
#pragma unroll
    for (int i = 0; i < kPanelRows / 4; i++) {
      const int row = i * 4 + lane / 8;
      const uint8_t* from = panel.codes + size_t(min(panel.row + row, N - 1)) * stride;
      copy16_or_zeros(into.codes + place(row, piece), from + (there ? k : 0), there);
    }
    if (lane < kPanelRows)
      copy4(into.scales + lane, panel.scales + size_t(min(panel.row + lane, N - 1) >> log_rows) * scale_stride + unit);
  }

  // panels(u, p) is the panel p and unit(u) the unit of the warp's u-th piece of work, for u below `count`. Before run.
  template <typename Panel, typename Unit>
  __device__ void start(const Panel& panel, const Unit& unit, int count) const {
    if (count > 0) {
#pragma unroll
      for (int p = 0; p < PANELS; p++) fetch(panel(0, p), unit(0), ring[p]);
    }
    end_copies();
  }

  // sum[p] += the product of panel p with the activations. activations(u, k) are 8 values from k of this lane's row of activations (g), zeros
  // where there are none; factor(u) multiplies all of a piece.
  template <typename Panel, typename Unit, typename Activations, typename Factor>
  __device__ void run(const Panel& panel, const Unit& unit, int count, const Activations& activations, const Factor& factor, float (&sum)[PANELS][4]) const {
    for (int u = 0; u < count; u++) {
      await_copies<0>();
      __syncwarp();
      if (u + 1 < count) {
#pragma unroll
        for (int p = 0; p < PANELS; p++) fetch(panel(u + 1, p), unit(u + 1), ring[(u + 1) % 2 * PANELS + p]);
      }
      end_copies();
      compute(unit(u), ring + u % 2 * PANELS, [&](int k) { return activations(u, k); }, factor(u), sum);
    }
    await_copies<0>();
  }

 private:
  template <typename Activations>
  __device__ void compute(int unit, const Buffer* buffers, const Activations& activations, float factor, float (&sum)[PANELS][4]) const {
    uint4 parts[2][2];  // all on their way before the first is used
#pragma unroll
    for (int step = 0; step < 2; step++) {
      const int k = unit * kUnit + step * 64 + t * 16;
      parts[step][0] = activations(k), parts[step][1] = activations(k + 8);
    }
    float c[PANELS][4] = {};
#pragma unroll
    for (int step = 0; step < 2; step++) {
      const uint4 low = parts[step][0], high = parts[step][1];
      const uint32_t x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int p = 0; p < PANELS; p++) {
        const uint4 even = *reinterpret_cast<const uint4*>(buffers[p].codes + place(2 * g, step * 4 + t));
        const uint4 odd = *reinterpret_cast<const uint4*>(buffers[p].codes + place(2 * g + 1, step * 4 + t));
        const uint32_t v[4] = {even.x, even.y, even.z, even.w}, w[4] = {odd.x, odd.y, odd.z, odd.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
          multiply<T>(c[p], fp8_pair<T, false>(v[i]), fp8_pair<T, false>(w[i]), fp8_pair<T, true>(v[i]), fp8_pair<T, true>(w[i]), x[2 * i], x[2 * i + 1]);
      }
    }
#pragma unroll
    for (int p = 0; p < PANELS; p++) {
      const float2 scale = *reinterpret_cast<const float2*>(buffers[p].scales + 2 * g);
      sum[p][0] += c[p][0] * (scale.x * factor), sum[p][1] += c[p][1] * (scale.x * factor);
      sum[p][2] += c[p][2] * (scale.y * factor), sum[p][3] += c[p][3] * (scale.y * factor);
    }
  }
};

}  // namespace qwen
