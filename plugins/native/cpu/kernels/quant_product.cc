// One panel of a quantised matrix times one tile of quantised activations.

#include "../quant.h"
#include "quant_lanes.h"

namespace qwen::QWEN_SET {
namespace {

// Adds the dot products of 32 values to `sum`. `codes` is this half of the panel, `a` the first row's activations.
template <int BITS, int ROWS>
inline void unit(const uint8_t* codes, const int8_t* a, int stride, Ints (&sum)[ROWS]) {
  constexpr int kGroupBytes = kPanelRows * 4;
#pragma GCC unroll 8
  for (int group = 0; group < kQuantUnit * BITS / 32; group++) {
    const Codes c = load_codes(codes + group * kGroupBytes);
    if constexpr (BITS == 4) {
      const Codes first = low(c), second = high(c);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) sum[m] = dot<BITS>(sum[m], first, a + (2 * group * stride + m) * 4);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) sum[m] = dot<BITS>(sum[m], second, a + ((2 * group + 1) * stride + m) * 4);
    } else {
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) sum[m] = dot<BITS>(sum[m], c, a + (group * stride + m) * 4);
    }
  }
}

// Rows first..first+ROWS-1 of the tile; lanes `lane`.. of the panel.
template <int BITS, bool ZEROS, typename Scale, int ROWS>
void product(const QuantFormat& format, const uint8_t* panel, const QuantTile& tile, int first, int lane, float* out) {
  constexpr int kUnitBytes = kQuantUnit * kPanelRows * BITS / 8;
  const int64_t blocks = format.blocks();
  const int units = format.block / kQuantUnit, stride = tile.rows;
  const Scale* scales = reinterpret_cast<const Scale*>(panel) + lane;
  const uint8_t* zeros = panel + format.zeros_at() + lane;
  const uint8_t* codes = panel + format.codes_at() + lane * 4;
  const int8_t* a = tile.codes + first * 4;
  const float *a_scales = tile.scales + first, *corrections = tile.corrections + first;
  Floats total[ROWS];
  for (int m = 0; m < ROWS; m++) total[m] = zero_floats();
  for (int64_t block = 0; block < blocks; block++) {
    Ints sum[ROWS];
    for (int m = 0; m < ROWS; m++) sum[m] = ZEROS ? zero_ints() : start(corrections + m);
    for (int u = 0; u < units; u++) {
#if defined(__AVX2__)
      for (int line = 0; line < kUnitBytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(codes) + 2048 + line, _MM_HINT_T0);
#endif
      unit<BITS, ROWS>(codes, a, stride, sum);
      codes += kUnitBytes;
      a += kQuantUnit * stride;
    }
    const Floats scale = load_scales(scales);
    for (int m = 0; m < ROWS; m++) {
      Floats value = to_floats(sum[m]);
      // Integers below 2^24 and their products with a zero are exact in fp32.
      if constexpr (ZEROS) value = subtract_product(value, multiply_add(load_zeros(zeros), same(1.0f), same(-float(kBias<BITS>))), same(corrections[m]));
      total[m] = multiply_add(value, multiply(scale, same(a_scales[m])), total[m]);
    }
    scales += kPanelRows;
    zeros += kPanelRows;
    a_scales += stride;
    corrections += stride;
  }
  for (int m = 0; m < ROWS; m++) store(out + m * kPanelRows, total[m]);
}

template <int BITS, bool ZEROS, typename Scale, int ROWS>
void rows(const QuantFormat& format, const uint8_t* panel, const QuantTile& tile, float* out) {
  for (int lane = 0; lane < kPanelRows; lane += kLanes) {
    int first = 0;
    for (; first + kMaxRows <= tile.rows; first += kMaxRows)
      product<BITS, ZEROS, Scale, kMaxRows>(format, panel, tile, first, lane, out + first * kPanelRows + lane);
    if constexpr (ROWS > 0) product<BITS, ZEROS, Scale, ROWS>(format, panel, tile, first, lane, out + first * kPanelRows + lane);
  }
}

template <int BITS, bool ZEROS, typename Scale>
void choose_rows(const QuantFormat& format, const uint8_t* panel, const QuantTile& tile, float* out) {
  switch (tile.rows % kMaxRows) {
#define CASE(ROWS) \
  case ROWS: return rows < BITS, ZEROS, Scale, ROWS < kMaxRows ? ROWS : 0 > (format, panel, tile, out);
    CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
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
  const uint8_t* panel = packed + size_t(row / kPanelRows) * format.panel_bytes();
  const int lane = int(row % kPanelRows);
  const uint8_t *zeros = panel + format.zeros_at() + lane, *codes = panel + format.codes_at() + lane * 4;
  for (int64_t block = 0; block < format.blocks(); block++) {
    float scale, zero = format.zeros ? zeros[block * kPanelRows] : float(format.offset());
    if (format.wide_scales)
      scale = reinterpret_cast<const float*>(panel)[block * kPanelRows + lane];
    else
      scale = half_to_float(reinterpret_cast<const uint16_t*>(panel)[block * kPanelRows + lane]);
    const int64_t begin = block * format.block, end = begin + format.block < format.K ? begin + format.block : format.K;
    for (int64_t k = begin; k < end; k++) {
      const uint8_t byte = format.bits == 8 ? codes[k / 4 * 64 + k % 4] : codes[k / 8 * 64 + k % 4];
      const int code = format.bits == 8 ? byte : (k / 4) % 2 ? byte >> 4 : byte & 15;
      out[k] = scale * (float(code) - zero);
    }
  }
}

}  // namespace qwen::QWEN_SET
