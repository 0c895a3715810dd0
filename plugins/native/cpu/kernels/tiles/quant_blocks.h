// What the two products of quantized matrices in tile registers share (quant_panels.cc, quant_streams.cc): codes as signed bytes, the sums of
// a block, and what is made of a sum.
#pragma once

#include <type_traits>
#include <utility>

#include "../../quant.h"
#include "../quant_lanes.h"
#include "tile_registers.h"

namespace qwen::QWEN_SET {

constexpr int kVectors = kPanelRows / kLanes;
constexpr int kHalfRows = kTileSlots / 2;

// Prefetches what follows a line of codes in memory.
inline void fetch_behind(const uint8_t* line) {
  __builtin_prefetch(line + kFarAhead, 0, 2);
  __builtin_prefetch(line + kNearAhead, 0, 3);
}

// Codes as signed bytes. FETCH: they come from memory.
template <bool FETCH>
inline void open_codes(int bits, int offset, const uint8_t* from, size_t bytes, int8_t* to) {
#if defined(__AVX512F__)
  const __m512i less = _mm512_set1_epi8(char(offset)), mask = _mm512_set1_epi8(15);
  for (size_t at = 0; at < bytes; at += 64) {
    if (FETCH) fetch_behind(from + at);
    const __m512i c = _mm512_loadu_si512(from + at);
    if (bits == 8) {
      _mm512_storeu_si512(to + at, _mm512_sub_epi8(c, less));
    } else {
      _mm512_storeu_si512(to + 2 * at, _mm512_sub_epi8(_mm512_and_si512(c, mask), less));
      _mm512_storeu_si512(to + 2 * at + 64, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(c, 4), mask), less));
    }
  }
#else
  for (size_t at = 0; at < bytes; at += 64)
    for (size_t i = 0; i < 64; i++) {
      if (bits == 8) {
        to[at + i] = int8_t(int(from[at + i]) - offset);
      } else {
        to[2 * at + i] = int8_t(int(from[at + i] & 15) - offset);
        to[2 * at + 64 + i] = int8_t(int(from[at + i] >> 4) - offset);
      }
    }
#endif
}

// `count` blocks of a panel, which are stored together: their codes, scales and zeros (less the offset) as products take them. Returns what
// follows them in the panel.
template <bool FETCH>
inline const uint8_t* open_group(const QuantFormat& format, const uint8_t* panel, int count, int8_t* codes, float* scales, float* zeros) {
  if (FETCH)
    for (size_t at = 0; at < format.codes_at(); at += 64) fetch_behind(panel + at);
  for (int i = 0; i < count * kPanelRows; i += kLanes) {
    store(scales + i, format.wide_scales ? load_scales(reinterpret_cast<const float*>(panel) + i)
                                         : load_scales(reinterpret_cast<const uint16_t*>(panel) + i));
    if (format.zeros) store(zeros + i, add(load_zeros(panel + format.zeros_at() + i), same(-float(format.offset()))));
  }
  const size_t bytes = size_t(count) * format.block_bytes();
  open_codes<FETCH>(format.bits, format.offset(), panel + format.codes_at(), bytes, codes);
  return panel + format.codes_at() + bytes;
}

// Every loop over the totals is unrolled: else the compiler leaves them in memory.
#define UNROLL _Pragma("GCC unroll 16")

// What has been read of a panel and of a tile, and what to fetch of memory meanwhile.
struct Position {
  const int8_t *a, *b;
  const float *a_scales, *a_sums, *scales, *zeros;
  Ahead ahead;
};

// The sums of a block [16,16] into `to`.
template <int PARTS>
inline __attribute__((always_inline)) void block_sums(Position& at, int depth, int32_t* to) {
  for (int line = 0; line < at.ahead.lines; line++, at.ahead.from += 64) __builtin_prefetch(at.ahead.from, 0, 2);
  tile_zero<0>();
  UNROLL for (int part = 0; part < PARTS; part++) {
    tile_load<1>(at.a, size_t(depth));
    tile_load<2>(at.b, 64);
    tile_dot<0, 1, 2>();
    at.a += kTileSlots * depth, at.b += kPanelRows * depth;
  }
  tile_store<0>(to, 64);
}

template <int ROWS, bool ZEROS>
inline __attribute__((always_inline)) void add_block(Position& at, const int32_t* sums, Floats (&total)[ROWS * kVectors]) {
  UNROLL for (int v = 0; v < kVectors; v++) {
    const Floats scale = load_scales(at.scales + v * kLanes);
    UNROLL for (int m = 0; m < ROWS; m++) {
      Floats value = to_floats(load_ints(sums + m * kPanelRows + v * kLanes));
      if constexpr (ZEROS) value = subtract_product(value, load_scales(at.zeros + v * kLanes), same(at.a_sums[m]));
      total[m * kVectors + v] = multiply_add(value, multiply(scale, same(at.a_scales[m])), total[m * kVectors + v]);
    }
  }
  at.scales += kPanelRows, at.zeros += kPanelRows, at.a_scales += kTileSlots, at.a_sums += kTileSlots;
}

// Calls body(std::integral_constant) with the parts of a block.
template <typename Body>
inline void with_parts(const QuantFormat& format, const Body& body) {
  switch (format.block / quant_tile_depth(format)) {
#define CASE(PARTS) \
  case PARTS: return body(std::integral_constant<int, PARTS>());
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(7)
#undef CASE
  }
}

}  // namespace qwen::QWEN_SET
