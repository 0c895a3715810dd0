// Products of quantized matrices in tile registers, over panels that were opened: integer sums of a block for 16 rows by 16 columns in one or
// a few instructions, and then what quant_product.cc does with a sum, in the same order: a row has the same bits in both.

#include "quant_blocks.h"

namespace qwen::QWEN_SET {
namespace {

struct OpenPanel {
  int8_t* codes;  // [padded / 4][16][4]: tiles of `depth` / 4 rows
  float* scales;  // [blocks][16]
  float* zeros;   // [blocks][16], as the codes are: less the offset

  OpenPanel(const QuantFormat& format, uint8_t* memory)
      : codes(reinterpret_cast<int8_t*>(memory)),
        scales(reinterpret_cast<float*>(memory + size_t(format.padded()) * kPanelRows)),
        zeros(scales + format.blocks() * kPanelRows) {}
};

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
  with_parts(format, [&](auto parts) { product<ROWS, ZEROS, parts.value>(format, panel, tile, ahead, out); });
}

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
    panel = open_group<false>(format, panel, count, codes, open.scales + block * kPanelRows, open.zeros + block * kPanelRows);
    codes += size_t(count) * size_t(format.block) * kPanelRows;
  }
}

void quant_tile_product(const QuantFormat& format, const uint8_t* opened, const QuantTile& tile, const Ahead& ahead, float* out) {
  const OpenPanel panel(format, const_cast<uint8_t*>(opened));
  const auto run = tile.rows <= kHalfRows ? (format.zeros ? choose_parts<kHalfRows, true> : choose_parts<kHalfRows, false>)
                                          : (format.zeros ? choose_parts<kTileSlots, true> : choose_parts<kTileSlots, false>);
  run(format, panel, tile, ahead, out);
}

}  // namespace qwen::QWEN_SET
