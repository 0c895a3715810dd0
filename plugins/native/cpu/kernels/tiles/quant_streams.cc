// Products of quantized matrices in tile registers, over panels as they are stored, for one or two tiles of rows: a few blocks at a time are
// opened into the first cache, so that the panel is read once and in order, which is how memory gives most. The bits are those of
// quant_panels.cc.

#include "quant_blocks.h"

namespace qwen::QWEN_SET {
namespace {

// Opened blocks that are stored together.
struct alignas(64) OpenGroup {
  int8_t codes[kGroupBlocks * kMostBlock * kPanelRows];
  float scales[kGroupBlocks * kPanelRows], zeros[kGroupBlocks * kPanelRows];
};

template <int ROWS, bool ZEROS, int PARTS>
void product(const QuantFormat& format, const uint8_t* panel, const QuantTile& tile, float* out) {
  const int depth = quant_tile_depth(format);
  const int64_t blocks = format.blocks();
  OpenGroup groups[2];
  int64_t opened = 0;
  const auto open_next = [&] {
    if (opened >= blocks) return;
    OpenGroup& group = groups[opened / kGroupBlocks % 2];
    const int count = int(blocks - opened < kGroupBlocks ? blocks - opened : kGroupBlocks);
    panel = open_group<true>(format, panel, count, group.codes, group.scales, group.zeros);
    opened += kGroupBlocks;
  };
  open_next();
  Position at = {tile.codes, groups[0].codes, tile.scales, tile.corrections, groups[0].scales, groups[0].zeros, {}};
  alignas(64) int32_t sums[2][kTileSlots * kPanelRows];
  Floats total[ROWS * kVectors];
  UNROLL for (int i = 0; i < ROWS * kVectors; i++) total[i] = zero_floats();
  // Opened blocks are some blocks old when a tile reads them, and sums are one block old when they are added.
  block_sums<PARTS>(at, depth, sums[0]);
  open_next();
  int32_t *ready = sums[0], *next = sums[1];
  for (int64_t block = 1; block < blocks; block++) {
    const OpenGroup& group = groups[block / kGroupBlocks % 2];
    const bool first = block % kGroupBlocks == 0;
    if (first) at.b = group.codes;
    block_sums<PARTS>(at, depth, next);
    add_block<ROWS, ZEROS>(at, ready, total);
    std::swap(ready, next);
    if (!first) continue;
    at.scales = group.scales, at.zeros = group.zeros;
    open_next();
  }
  add_block<ROWS, ZEROS>(at, ready, total);
  UNROLL for (int i = 0; i < ROWS * kVectors; i++) store(out + i * kLanes, total[i]);
}

template <int ROWS, bool ZEROS>
void choose_parts(const QuantFormat& format, const uint8_t* panel, const QuantTile& tile, float* out) {
  with_parts(format, [&](auto parts) { product<ROWS, ZEROS, parts.value>(format, panel, tile, out); });
}

}  // namespace

void quant_stream_product(const QuantFormat& format, const uint8_t* panel, const QuantTile& tile, float* out) {
  const auto run = tile.rows <= kHalfRows ? (format.zeros ? choose_parts<kHalfRows, true> : choose_parts<kHalfRows, false>)
                                          : (format.zeros ? choose_parts<kTileSlots, true> : choose_parts<kTileSlots, false>);
  run(format, panel, tile, out);
}

}  // namespace qwen::QWEN_SET
