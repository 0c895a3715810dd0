// One panel of a quantized matrix times one tile of quantized activations.

#include "../quant.h"
#include "quant_lanes.h"

namespace qwen::QWEN_SET {
namespace {

// Adds the dot products of 32 values to `sum`. `codes` is this part of the panel, `a` the tile's activations.
template <int BITS, int ROWS>
inline void unit(const uint8_t* codes, const int8_t* a, Ints (&sum)[ROWS], Ints (&other)[ROWS]) {
  Ints(&odd)[ROWS] = ROWS <= 2 ? other : sum;
  constexpr int kGroupBytes = kPanelRows * 4;
#pragma GCC unroll 8
  for (int group = 0; group < kQuantUnit * BITS / 32; group++) {
    if constexpr (BITS == 4) {
      const Codes pairs = load_pairs(codes + group * kGroupBytes), first = low(pairs), second = high(pairs);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) sum[m] = dot<BITS>(sum[m], first, a + (2 * group * ROWS + m) * 4);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) odd[m] = dot<BITS>(odd[m], second, a + ((2 * group + 1) * ROWS + m) * 4);
    } else {
      const Codes c = load_codes(codes + group * kGroupBytes);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) {
        Ints& s = group % 2 ? odd[m] : sum[m];
        s = dot<BITS>(s, c, a + (group * ROWS + m) * 4);
      }
    }
  }
}

template <int BITS, bool ZEROS, typename Scale, int ROWS>
void product(const QuantFormat& format, const uint8_t* panel, const QuantTile& tile, float* out) {
  constexpr int kUnitBytes = kQuantUnit * kPanelRows * BITS / 8;
  constexpr int kHeader = kGroupBlocks * kPanelRows * (int(sizeof(Scale)) + (ZEROS ? 1 : 0));
  const int units = format.block / kQuantUnit;
  for (int lane = 0; lane < kPanelRows; lane += kLanes) {
    const bool fetches = lane == 0;  // the lanes after these read the same lines
    const uint8_t* codes = panel + lane * 4;
    const int8_t* a = tile.codes;
    const float *a_scales = tile.scales, *corrections = tile.corrections;
    Floats total[ROWS];
    for (int m = 0; m < ROWS; m++) total[m] = zero_floats();
    for (int64_t left = format.blocks(); left > 0; left -= kGroupBlocks) {
      const uint8_t* header = codes - lane * 4;
      if (fetches) ahead<kHeader>(codes);
      codes += kHeader;
      const int count = left < kGroupBlocks ? int(left) : kGroupBlocks;
      for (int block = 0; block < count; block++) {
        // Few rows leave registers for a second set of sums, which halves the chains of dependent additions.
        Ints sum[ROWS], other[ROWS];
        for (int m = 0; m < ROWS; m++) sum[m] = ZEROS ? zero_ints() : start(corrections + m), other[m] = zero_ints();
        int u = units;
        do {
          if (fetches) ahead<kUnitBytes>(codes);
          unit<BITS, ROWS>(codes, a, sum, other);
          codes += kUnitBytes;
          a += kQuantUnit * ROWS;
        } while (--u > 0);
        const Floats scale = load_scales(reinterpret_cast<const Scale*>(header) + block * kPanelRows + lane);
        for (int m = 0; m < ROWS; m++) {
          Floats value = to_floats(add(sum[m], other[m]));
          if constexpr (ZEROS) {  // integers below 2^24 and their products with a zero are exact in fp32
            const Floats zero = load_zeros(header + kGroupBlocks * kPanelRows * sizeof(Scale) + block * kPanelRows + lane);
            value = subtract_product(value, add(zero, same(-float(kBias<BITS>))), same(corrections[m]));
          }
          total[m] = multiply_add(value, multiply(scale, same(a_scales[m])), total[m]);
        }
        a_scales += ROWS;
        corrections += ROWS;
      }
    }
    for (int m = 0; m < ROWS; m++) store(out + m * kPanelRows + lane, total[m]);
  }
}

template <int BITS, bool ZEROS, typename Scale>
void choose_rows(const QuantFormat& format, const uint8_t* panel, const QuantTile& tile, float* out) {
  switch (tile.rows) {
#define CASE(ROWS) \
  case ROWS: return product < BITS, ZEROS, Scale, ROWS <= kTileRows ? ROWS : 1 > (format, panel, tile, out);
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
  }
}

template <int BITS>
void choose_format(const QuantFormat& format, const uint8_t* panel, const QuantTile& tile, float* out) {
  const auto product = format.zeros ? (format.wide_scales ? choose_rows<BITS, true, float> : choose_rows<BITS, true, uint16_t>)
                                    : (format.wide_scales ? choose_rows<BITS, false, float> : choose_rows<BITS, false, uint16_t>);
  product(format, panel, tile, out);
}

// e^x to 2 units in the last place, for x that silu has clamped. The polynomial is Taylor's on |r| <= ln 2 / 2.
inline float exponential(float x) {
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

}  // namespace

int quant_tile_rows() { return kTileRows; }

void quant_panel(const QuantFormat& format, const uint8_t* panel, const QuantTile& tile, float* out) {
  (format.bits == 4 ? choose_format<4> : choose_format<8>)(format, panel, tile, out);
}

void quant_swiglu(const float* gate, const float* up, int count, float* out) {
  for (int i = 0; i < count; i++) {
    const float g = gate[i], clamped = g < -87.0f ? -87.0f : g > 87.0f ? 87.0f : g;
    out[i] = g / (1.0f + exponential(-clamped)) * up[i];
  }
}

void quant_row(const QuantFormat& format, const uint8_t* packed, int64_t row, float* out) {
  const uint8_t* at = packed + size_t(row / kPanelRows) * format.panel_bytes();
  const int lane = int(row % kPanelRows);
  for (int64_t block = 0; block < format.blocks(); block++) {
    const int place = int(block % kGroupBlocks) * kPanelRows + lane;
    const uint8_t* header = at;
    const float scale = format.wide_scales ? reinterpret_cast<const float*>(header)[place] : half_to_float(reinterpret_cast<const uint16_t*>(header)[place]);
    const float zero = format.zeros ? header[format.zeros_at() + place] : float(format.offset());
    const uint8_t* codes = header + format.codes_at() + size_t(block % kGroupBlocks) * format.block_bytes() + lane * 4;
    const int64_t begin = block * format.block, count = begin + format.block < format.K ? format.block : format.K - begin;
    for (int64_t k = 0; k < count; k++) {
      const uint8_t byte = format.bits == 8 ? codes[k / 4 * 64 + k % 4] : codes[k / 8 * 64 + k % 4];
      const int code = format.bits == 8 ? byte : (k / 4) % 2 ? byte >> 4 : byte & 15;
      out[begin + k] = scale * (float(code) - zero);
    }
    if (block % kGroupBlocks == kGroupBlocks - 1) at += format.codes_at() + kGroupBlocks * format.block_bytes();
  }
}

}  // namespace qwen::QWEN_SET
