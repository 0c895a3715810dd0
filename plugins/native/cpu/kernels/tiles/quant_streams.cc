// Products of quantized matrices in tile registers, over panels as they are stored, for a few tiles of rows: some blocks at a time are opened
// into the first cache, so that the panel is read once and in order, which is how memory gives most. The bits are those of quant_panels.cc.

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

// Totals of a tile go on from those in `out` over some opened blocks, the first of which is `block`.
template <int ROWS, bool ZEROS, int PARTS>
void go_on(const QuantFormat& format, const OpenGroup& group, int64_t block, int count, const QuantTile& tile, float* out) {
  const int depth = quant_tile_depth(format);
  const int64_t line = block * kTileSlots;
  Position at = {tile.codes + line * format.block, group.codes, tile.scales + line, tile.corrections + line, group.scales, group.zeros, {}};
  alignas(64) int32_t sums[2][kTileSlots * kPanelRows];
  Floats total[ROWS * kVectors];
  UNROLL for (int i = 0; i < ROWS * kVectors; i++) total[i] = block == 0 ? zero_floats() : load_scales(out + i * kLanes);
  block_sums<PARTS>(at, depth, sums[0]);
  for (int i = 1; i < count; i++) {
    block_sums<PARTS>(at, depth, sums[i % 2]);
    add_block<ROWS, ZEROS>(at, sums[(i - 1) % 2], total);
  }
  add_block<ROWS, ZEROS>(at, sums[(count - 1) % 2], total);
  UNROLL for (int i = 0; i < ROWS * kVectors; i++) store(out + i * kLanes, total[i]);
}

template <bool ZEROS, int PARTS>
void products(const QuantFormat& format, const uint8_t* panel, const QuantTile* tiles, int count, float* out, size_t stride) {
  OpenGroup group;
  for (int64_t block = 0; block < format.blocks(); block += kGroupBlocks) {
    const int here = int(format.blocks() - block < kGroupBlocks ? format.blocks() - block : kGroupBlocks);
    panel = open_group<true>(format, panel, here, group.codes, group.scales, group.zeros);
    for (int t = 0; t < count; t++) {
      const auto run = tiles[t].rows <= kHalfRows ? go_on<kHalfRows, ZEROS, PARTS> : go_on<kTileSlots, ZEROS, PARTS>;
      run(format, group, block, here, tiles[t], out + size_t(t) * stride);
    }
  }
}

template <bool ZEROS, int PARTS>
void choose_rows(const QuantFormat& format, const uint8_t* panel, const QuantTile* tiles, int count, float* out, size_t stride) {
  if (count > 1) return products<ZEROS, PARTS>(format, panel, tiles, count, out, stride);
  (tiles->rows <= kHalfRows ? product<kHalfRows, ZEROS, PARTS> : product<kTileSlots, ZEROS, PARTS>)(format, panel, *tiles, out);
}

}  // namespace

void quant_stream_product(const QuantFormat& format, const uint8_t* panel, const QuantTile* tiles, int count, float* out, size_t stride) {
  with_parts(format, [&](auto parts) {
    (format.zeros ? choose_rows<true, parts.value> : choose_rows<false, parts.value>)(format, panel, tiles, count, out, stride);
  });
}

}  // namespace qwen::QWEN_SET
