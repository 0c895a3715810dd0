// Panels of quantized matrices, for the resident products (resident_few.cuh): how a warp fetches a unit of 128 k of a panel, and multiplies it.
// quant_stream.cuh says how codes become the operands of the tensor cores; no weight is rounded here either.
#pragma once

#include <type_traits>

#include "few_rows.cuh"
#include "quant_fragments.cuh"
#include "quant_stream.cuh"

namespace qwen {

// GENERAL: with zeros or wide scales. Without, nothing is asked about them.
template <typename T, int BITS, bool GENERAL>
struct QuantPanels {
  using Element = T;
  using Matrix = QuantMatrix;
  using Rows = FewRows<T>;
  using OfOneRow = QuantPanels;  // for products of a single row
  static constexpr bool kTogether = false;  // whether several panels are multiplied with activations that are read once
  static constexpr int kBits = BITS, kUnitK = kUnit, kCodes = kUnit * kPanelRows * BITS / 8;
  static constexpr int kLogPanelRows = 4;
  static_assert(1 << kLogPanelRows == kPanelRows);
  // A half of 16 bits holds 1024 + code in its lowest bits or 64 + code in bits 4 to 7: the second code of a byte need not be moved.
  static constexpr bool kInPlace = BITS == 4 && std::is_same<T, __half>::value;

  // Whether steps are faster with resident blocks than with those of product_few.cuh. Measured on an H200, as for the other format.
  static bool chosen(int N, int K) { return N >= K && N <= kMostResident && K <= kLongestResident; }

  __host__ __device__ static int unit_bytes(const Matrix& w) { return kCodes + kUnit / w.block * kPanelRows * (w.scale_bytes() + w.zeros); }

  const uint8_t* const packed;
  const int panel_bytes, bytes, log_block, group_bytes, codes_at, zeros_at, padded, lane, g, t;
  const bool zeros, wide;

  __device__ explicit QuantPanels(const Matrix& w)
      : packed(w.packed),
        panel_bytes(w.panel_bytes()),
        bytes(unit_bytes(w)),
        log_block(w.block == 32 ? 5 : w.block == 64 ? 6 : 7),
        group_bytes(w.group_bytes()),
        codes_at(w.codes_at()),
        zeros_at(w.zeros_at()),
        padded(w.padded()),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4),
        zeros(GENERAL && w.zeros),
        wide(GENERAL && w.wide_scales) {}

  // Start copying a unit of the panel whose first row is `row`: codes, scales, zeros. Scales of blocks that there are not become 0.
  __device__ void fetch(int row, int unit, uint8_t* into) const {
    const int first = unit * kUnit, group = first >> (log_block + 2), inside = first >> log_block & (kGroupBlocks - 1);
    const int left = padded - first, blocks = min(left, kUnit) >> log_block, all = kUnit >> log_block;
    const uint8_t* at = packed + int64_t(row >> kLogPanelRows) * panel_bytes + group * group_bytes;
    const uint8_t* codes = at + codes_at + (first - (group << (log_block + 2))) * (kPanelRows * BITS / 8) + lane * 16;
#pragma unroll
    for (int i = 0; i < kCodes / 512; i++) {
      if ((i * 32 + lane) * 8 < left * BITS) copy16(into + (i * 32 + lane) * 16, codes + i * 512);
    }
    const int pieces = wide ? 4 : 2;  // of 16 bytes, for the scales of a block
    if (lane < all * pieces) {
      const bool there = lane < blocks * pieces;
      copy16_or_zeros(into + kCodes + lane * 16, at + (there ? inside * pieces + lane : 0) * 16, there);
    }
    if (zeros && lane < blocks) copy16(into + kCodes + (all * pieces + lane) * 16, at + zeros_at + (inside + lane) * 16);
  }

  // What a lane multiplies with a unit of any panel.
  struct Activations {
    uint4 x[kUnit / kStep];
  };
  __device__ void read(const Rows& rows, int unit, Activations& of) const { rows.read(g, unit * kUnitChunks + t, kStep / kChunk, of.x); }

  __device__ void multiply_unit(const uint8_t* buffer, int unit, const Rows& rows, float (&sum)[4]) const {
    Activations with;
    read(rows, unit, with);
    multiply_panel(buffer, with, sum);
  }

  // sum[0], [1]: row 2g of the panel with activation rows 2t, 2t+1; [2], [3]: row 2g+1.
  __device__ void multiply_panel(const uint8_t* buffer, const Activations& with, float (&sum)[4]) const {
#pragma unroll
    for (int step = 0; step < kUnit / kStep; step++) {
      const uint4 x = with.x[step];
      const int block = step * kStep >> log_block;
      const uint8_t* scales = buffer + kCodes;
      float2 scale;
      if (wide)
        scale = *reinterpret_cast<const float2*>(scales + (block * kPanelRows + 2 * g) * 4);
      else
        scale = __half22float2(*reinterpret_cast<const __half2*>(scales + (block * kPanelRows + 2 * g) * 2));
      uint32_t zero0 = 1u << (BITS - 1), zero1 = zero0;
      if (zeros) {
        const uchar2 both = *reinterpret_cast<const uchar2*>(scales + (kUnit >> log_block) * kPanelRows * (wide ? 4 : 2) + block * kPanelRows + 2 * g);
        zero0 = both.x, zero1 = both.y;
      }
      const uint32_t low0 = Pair<T, BITS>::zero(zero0), low1 = Pair<T, BITS>::zero(zero1);
      float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if constexpr (BITS == 4) {
        // A word has k 0, 4, 1, 5, 2, 6, 3, 7 from its lowest bits: pairs (0,2), (4,6), (1,3), (5,7).
        const uint2 w = *reinterpret_cast<const uint2*>(buffer + step * 256 + t * 64 + g * 8);
        const uint2 v = make_uint2(w.x >> 8, w.y >> 8);
        multiply<T>(c, lower(w.x, low0), lower(w.y, low1), upper(w.x, zero0), upper(w.y, zero1), __byte_perm(x.x, x.y, 0x5410),
                    __byte_perm(x.z, x.w, 0x5410));
        multiply<T>(c, lower(v.x, low0), lower(v.y, low1), upper(v.x, zero0), upper(v.y, zero1), __byte_perm(x.x, x.y, 0x7632),
                    __byte_perm(x.z, x.w, 0x7632));
      } else {
        const uint2 v = *reinterpret_cast<const uint2*>(buffer + step * 512 + t * 128 + g * 8);
        const uint2 w = *reinterpret_cast<const uint2*>(buffer + step * 512 + t * 128 + 64 + g * 8);
        const auto pair = [](uint32_t word, uint32_t zero) { return Pair<T, BITS>::of(word, zero); };
        multiply<T>(c, pair(v.x, low0), pair(v.y, low1), pair(v.x >> 16, low0), pair(v.y >> 16, low1), x.x, x.y);
        multiply<T>(c, pair(w.x, low0), pair(w.y, low1), pair(w.x >> 16, low0), pair(w.y >> 16, low1), x.z, x.w);
      }
      sum[0] += c[0] * scale.x, sum[1] += c[1] * scale.x;
      sum[2] += c[2] * scale.y, sum[3] += c[3] * scale.y;
    }
  }

 private:
  // The codes in bits 0..3 and 16..19 of a word; `zero` as Pair has it.
  __device__ static uint32_t lower(uint32_t word, uint32_t zero) {
    if constexpr (kInPlace) {
      const uint32_t codes = masked(word, 0x000F000Fu, 0x64006400u);
      const __half2 pair = __hsub2(*reinterpret_cast<const __half2*>(&codes), *reinterpret_cast<const __half2*>(&zero));
      return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
      return Pair<T, BITS>::of(word, zero);
    }
  }

  // The codes in bits 4..7 and 20..23.
  __device__ static uint32_t upper(uint32_t word, uint32_t zero) {
    if constexpr (kInPlace) {
      const uint32_t codes = masked(word, 0x00F000F0u, 0x54005400u), bias = (0x5400u | zero << 4) * 0x10001u;
      const __half2 pair = __hsub2(*reinterpret_cast<const __half2*>(&codes), *reinterpret_cast<const __half2*>(&bias));
      return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
      return Pair<T, BITS>::of(word >> 4, Pair<T, BITS>::zero(zero));
    }
  }
};

}  // namespace qwen
