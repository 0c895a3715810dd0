// Products of quantized matrices in tile registers: integer sums of a block for 16 rows by 16 columns in one or a few instructions, and then
// what quant_product.cc does with a sum, in the same order: a row has the same bits in both.

#include <utility>

#include "../../quant.h"
#include "../quant_lanes.h"
#include "tile_registers.h"

namespace qwen::QWEN_SET {
namespace {

constexpr int kVectors = kPanelRows / kLanes;
constexpr int kHalfRows = kTileSlots / 2;

struct OpenPanel {
  int8_t* codes;  // [padded / 4][16][4]: tiles of `depth` / 4 rows
  float* scales;  // [blocks][16]
  float* zeros;   // [blocks][16], as the codes are: less the offset

  OpenPanel(const QuantFormat& format, uint8_t* memory)
      : codes(reinterpret_cast<int8_t*>(memory)),
        scales(reinterpret_cast<float*>(memory + size_t(format.padded()) * kPanelRows)),
        zeros(scales + format.blocks() * kPanelRows) {}
};

// Codes as signed bytes.
void open_codes(int bits, int offset, const uint8_t* from, size_t bytes, int8_t* to) {
#if defined(__AVX512F__)
  const __m512i less = _mm512_set1_epi8(char(offset)), mask = _mm512_set1_epi8(15);
  for (size_t at = 0; at < bytes; at += 64) {
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

template <int ROWS, bool ZEROS, int PARTS>
void product(const QuantFormat& format, const OpenPanel& panel, const QuantTile& tile, const Ahead& ahead, float* out) {
  const int depth = quant_tile_depth(format);
  Position at = {tile.codes, panel.codes, tile.scales, tile.corrections, panel.scales, panel.zeros, ahead};
  alignas(64) int32_t sums[2][kTileSlots * kPanelRows];
  Floats total[ROWS * kVectors];
  UNROLL for (int i = 0; i < ROWS * kVectors; i++) total[i] = zero_floats();
  // The sums of the next block are on their way while those of this one are added.
  block_sums<PARTS>(at, depth, sums[0]);
  int32_t *ready = sums[0], *next = sums[1];
  for (int64_t left = format.blocks(); left > 1; left--) {
    block_sums<PARTS>(at, depth, next);
    add_block<ROWS, ZEROS>(at, ready, total);
    std::swap(ready, next);
  }
  add_block<ROWS, ZEROS>(at, ready, total);
  UNROLL for (int i = 0; i < ROWS * kVectors; i++) store(out + i * kLanes, total[i]);
}

template <int ROWS, bool ZEROS>
void choose_parts(const QuantFormat& format, const OpenPanel& panel, const QuantTile& tile, const Ahead& ahead, float* out) {
  switch (format.block / quant_tile_depth(format)) {
#define CASE(PARTS) \
  case PARTS: return product<ROWS, ZEROS, PARTS>(format, panel, tile, ahead, out);
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(7)
#undef CASE
  }
}

#undef UNROLL

}  // namespace

void quant_tiles_begin(const QuantFormat& format) {
  TileShapes shapes;
  const int depth = quant_tile_depth(format);
  shapes.set(0, kTileSlots, 64);
  shapes.set(1, kTileSlots, depth);
  shapes.set(2, depth / 4, 64);
  tiles_begin(shapes);
}

void quant_tiles_end() { tiles_end(); }

void quant_open_panel(const QuantFormat& format, const uint8_t* panel, uint8_t* memory) {
  const OpenPanel open(format, memory);
  int8_t* codes = open.codes;
  for (int64_t block = 0; block < format.blocks(); block += kGroupBlocks) {
    const int count = int(format.blocks() - block < kGroupBlocks ? format.blocks() - block : kGroupBlocks);
    for (int i = 0; i < count * kPanelRows; i += kLanes) {
      const int64_t at = block * kPanelRows + i;
      store(open.scales + at, format.wide_scales ? load_scales(reinterpret_cast<const float*>(panel) + i)
                                                 : load_scales(reinterpret_cast<const uint16_t*>(panel) + i));
      if (format.zeros) store(open.zeros + at, add(load_zeros(panel + format.zeros_at() + i), same(-float(format.offset()))));
    }
    const size_t bytes = size_t(count) * format.block_bytes();
    open_codes(format.bits, format.offset(), panel + format.codes_at(), bytes, codes);
    codes += size_t(count) * size_t(format.block) * kPanelRows;
    panel += format.codes_at() + bytes;
  }
}

void quant_tile_product(const QuantFormat& format, const uint8_t* opened, const QuantTile& tile, const Ahead& ahead, float* out) {
  const OpenPanel panel(format, const_cast<uint8_t*>(opened));
  const auto run = tile.rows <= kHalfRows ? (format.zeros ? choose_parts<kHalfRows, true> : choose_parts<kHalfRows, false>)
                                          : (format.zeros ? choose_parts<kTileSlots, true> : choose_parts<kTileSlots, false>);
  run(format, panel, tile, ahead, out);
}

}  // namespace qwen::QWEN_SET
