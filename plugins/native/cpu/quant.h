// Quantized matrices: how they are stored in the file, and the kernels on them.
//
// A matrix w [N,K] is cut into panels of 16 rows, and each row into blocks of `block` values (the last one is filled up with codes that
// nothing multiplies). w[n,k] = scale * (code - zero), with a scale per row and block, and a zero per row and block or one for all. A panel is
// a sequence of groups of 4 blocks (the last group may have fewer), each group
//
//   scales  [4][16] fp16 or fp32
//   zeros   [4][16] u8, where the format has them
//   codes   for each block  [block / 4][16][4] u8 (8 bits), or
//                           [block / 8][16][4] u8 (4 bits): byte j of a row has value 8 g + j in its low half, 8 g + 4 + j in its high half
//
// so that a product reads one stream of whole cache lines, 64 bytes of which feed one multiply-add of bytes for 16 rows. Panels follow each
// other: the first rows of a matrix are a matrix of the same form. Products read it in the mapped file, nothing is copied;
// graphs/quantization/packing.py writes it.
//
// Activations are quantized per row and block to -127..127. A block's products are summed in integers, which is exact in any order, and
// blocks in fp32, in order: the result of a row does not depend on how many rows there are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace qwen {

constexpr int kPanelRows = 16;
constexpr int kMostLaneRows = 8;
constexpr int kTileSlots = 16, kMostTileDepth = 64;  // rows of a tile register and its bytes
constexpr int kQuantUnit = 32, kMostBlock = 256;  // blocks are multiples of the first, up to the second
constexpr int kGroupBlocks = 4;  // blocks whose scales are stored together

struct QuantFormat {
  int bits = 0;   // 4 or 8
  int block = 0;  // a multiple of 32
  bool zeros = false;
  bool wide_scales = false;  // fp32 instead of fp16
  int64_t N = 0, K = 0;

  int64_t panels() const { return (N + kPanelRows - 1) / kPanelRows; }
  int64_t blocks() const { return (K + block - 1) / block; }
  int64_t padded() const { return blocks() * block; }
  size_t zeros_at() const { return size_t(kGroupBlocks) * kPanelRows * (wide_scales ? 4 : 2); }         // in a group
  size_t codes_at() const { return zeros_at() + (zeros ? size_t(kGroupBlocks) * kPanelRows : 0); }
  size_t block_bytes() const { return size_t(block) * kPanelRows * bits / 8; }
  size_t panel_bytes() const { return size_t((blocks() + kGroupBlocks - 1) / kGroupBlocks) * codes_at() + size_t(blocks()) * block_bytes(); }
  int offset() const { return 1 << (bits - 1); }  // the zero of formats without zeros
};

// Some rows of quantized activations, in the order of one of the two kinds of products:
//
//   lanes   up to quant_tile_rows() rows, as the registers allow, share one reading of a panel; `unit` is 4 and `slots` is `rows`
//   tiles   up to 16 rows, in tile registers; `unit` is the depth of a tile; unused slots are zeros
struct QuantTile {
  int rows = 0, slots = 0, unit = 0;
  int8_t* codes = nullptr;       // [padded / unit][slots][unit]
  float* scales = nullptr;       // [blocks][slots]
  float* corrections = nullptr;  // [blocks][slots]: with zeros the sum of the codes as fp32, else, for lanes, what the sum starts with, as int32

  static size_t bytes(const QuantFormat& format, int slots) {
    return size_t(slots) * (size_t(format.padded()) + size_t(format.blocks()) * 2 * sizeof(float));
  }
  static QuantTile at(void* memory, const QuantFormat& format, int rows, int slots, int unit) {
    QuantTile tile;
    tile.rows = rows, tile.slots = slots, tile.unit = unit;
    tile.codes = static_cast<int8_t*>(memory);
    tile.scales = reinterpret_cast<float*>(tile.codes + size_t(slots) * format.padded());
    tile.corrections = tile.scales + size_t(slots) * format.blocks();
    return tile;
  }
};

// quant_tile_rows: the most rows of a tile in lanes, at most kMostLaneRows.
// quantize_tile: rows x [tile.rows, K] into the tile of either kind, after an RMS norm with weight `norm` [K] where that is given. `scratch`: padded() values.
// quant_panel: one panel times one tile: out [tile.rows, 16].
// quant_swiglu: out [rows, 16] = silu(gate) * up, over one panel's worth of results.
// quant_row: row `row` of a matrix as fp32 [K].
#define QWEN_QUANT(SET)                                                                                                        \
  namespace SET {                                                                                                              \
  int quant_tile_rows();                                                                                                       \
  void quantize_tile(const QuantFormat& format, const float* x, const float* norm, float epsilon, float* scratch, QuantTile tile); \
  void quant_panel(const QuantFormat& format, const uint8_t* panel, const QuantTile& tile, float* out);                        \
  void quant_swiglu(const float* gate, const float* up, int count, float* out);                                                \
  void quant_row(const QuantFormat& format, const uint8_t* packed, int64_t row, float* out);                                   \
  }
QWEN_SETS(QWEN_QUANT)
#undef QWEN_QUANT

// What a product fetches of the panel that is opened next: it comes from memory, and opening it would wait.
struct Ahead {
  const uint8_t* from = nullptr;
  int lines = 0;  // of 64 bytes, per block
};

// quant_open_panel: a panel as quant_tile_product reads it, quant_open_bytes() of memory aligned to 64 bytes.
// quant_tiles_begin, quant_tiles_end: around the products of a thread.
// quant_tile_product: one panel times one tile: out [rows up to 8 or 16, 16], the bits of quant_panel. Meanwhile fetches `ahead.lines` lines of
// memory per block.
// quant_stream_product: one panel, as it is stored, times some tiles; results of tile t from out + t * stride on.
#define QWEN_QUANT_TILES(SET)                                                                                     \
  namespace SET {                                                                                                 \
  void quant_open_panel(const QuantFormat& format, const uint8_t* panel, uint8_t* memory);                        \
  void quant_tiles_begin(const QuantFormat& format);                                                              \
  void quant_tile_product(const QuantFormat& format, const uint8_t* opened, const QuantTile& tile, const Ahead& ahead, float* out); \
  void quant_stream_product(const QuantFormat& format, const uint8_t* panel, const QuantTile* tiles, int count, float* out, size_t stride); \
  void quant_tiles_end();                                                                                         \
  }
QWEN_TILE_SETS(QWEN_QUANT_TILES)
#undef QWEN_QUANT_TILES

// The part of a block that one tile takes.
inline int quant_tile_depth(const QuantFormat& format) { return format.block % kMostTileDepth == 0 ? kMostTileDepth : kQuantUnit; }

inline size_t quant_open_bytes(const QuantFormat& format) {
  return size_t(kPanelRows) * (size_t(format.padded()) + size_t(format.blocks()) * 2 * sizeof(float));
}

}  // namespace qwen
