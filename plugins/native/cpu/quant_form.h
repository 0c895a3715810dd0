// The two kinds of quantized products (quant.h) behind one face, for the ops: a row has the same bits in both.
//
//   lanes   panels as they are stored, rows a few at a time; decode steps, drafts, small batches
//   tiles   16 rows at a time, where has_tiles(). A few tiles read panels as they are stored; for more, as in prompts, a panel is opened once, to
//           signed bytes, and then takes all tiles
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>

#include "quant.h"
#include "thread_memory.h"

namespace qwen {

// Tiles that read a panel as it is stored: opening it for two takes as long, or up to 1.3 times where it then does not fit the first cache.
constexpr int kMostStreamed = 2;

// How M rows are multiplied.
class QuantForm {
 public:
  QuantForm(const QuantFormat& format, int64_t M) : format_(&format), M_(M), tiles_(has_tiles() && M >= kFewestInTiles) {}

  bool tiles() const { return tiles_; }
  bool streams() const { return tiles_ && count() <= kMostStreamed; }
  bool opens() const { return tiles_ && count() > 1; }  // for products of one tile at a time
  const QuantFormat& format() const { return *format_; }
  int64_t tile_rows() const {
    static const int lanes = QWEN_BEST(quant_tile_rows)();
    return tiles_ ? kTileSlots : lanes;
  }
  int64_t count() const { return (M_ + tile_rows() - 1) / tile_rows(); }
  size_t tile_bytes() const { return (QuantTile::bytes(*format_, int(tile_rows())) + 63) / 64 * 64; }

  // Tile `t` of those whose memory begins at `memory`.
  QuantTile tile(void* memory, int64_t t) const {
    const int rows = int(std::min(tile_rows(), M_ - t * tile_rows()));
    void* const at = static_cast<char*>(memory) + size_t(t) * tile_bytes();
    if (!tiles_) return QuantTile::at(at, *format_, rows, rows, 4);
    return QuantTile::at(at, *format_, rows, kTileSlots, quant_tile_depth(*format_));
  }

 private:
  // A tile takes as long for 9 rows as for 16, which is as long as lanes for 9 or 10, depending on the format.
  static constexpr int64_t kFewestInTiles = 10;
  const QuantFormat* format_;
  int64_t M_;
  bool tiles_;
};

// Some panels of a matrix in one thread, ready for products with all tiles of a form. One at a time in a thread.
class Panels {
 public:
  // Bytes of a panel as the form reads it.
  static size_t bytes(const QuantForm& form) {
    return form.opens() ? (quant_open_bytes(form.format()) + 63) / 64 * 64 : form.format().panel_bytes();
  }

  // Room for `count` panels.
  Panels(const QuantForm& form, int64_t count) : form_(form) {
    if (!form.tiles()) return;
    static const auto begin = QWEN_TILES(quant_tiles_begin);
    static thread_local ThreadMemory memory;
    if (form.opens()) opened_ = reinterpret_cast<uint8_t*>(memory.at_least(size_t(count) * bytes(form)));
    begin(form.format());
  }
  ~Panels() {
    static const auto end = QWEN_TILES(quant_tiles_end);
    if (form_.tiles()) end();
  }
  Panels(const Panels&) = delete;
  Panels& operator=(const Panels&) = delete;

  // Before products with the stored panel, which goes into place `place`.
  void open(const uint8_t* stored, int64_t place) const {
    static const auto open = QWEN_TILES(quant_open_panel);
    if (form_.opens()) open(form_.format(), stored, opened_ + size_t(place) * bytes(form_));
  }

  // What the product with tile `t` of so many fetches of the panel that is opened after them; null: nothing.
  Ahead ahead(const uint8_t* next, int64_t t, int64_t tiles) const {
    if (next == nullptr || !form_.opens()) return {};
    const int64_t products = tiles * form_.format().blocks(), lines = (int64_t(form_.format().panel_bytes()) / 64 + products - 1) / products;
    return {next + t * form_.format().blocks() * lines * 64, int(lines)};
  }

  // out [16, 16], of which tile.rows rows count.
  void product(const uint8_t* stored, int64_t place, const QuantTile& tile, float* out, const Ahead& ahead = {}) const {
    static const auto lanes = QWEN_BEST(quant_panel);
    static const auto tiles = QWEN_TILES(quant_tile_product);
    if (form_.tiles() && !form_.opens())
      stream(stored, &tile, 1, out, 0);
    else if (form_.tiles())
      tiles(form_.format(), opened_ + size_t(place) * bytes(form_), tile, ahead, out);
    else
      lanes(form_.format(), stored, tile, out);
  }

  // With all of a few tiles, which nothing was opened for; results of tile t from out + t * stride on.
  void stream(const uint8_t* stored, const QuantTile* tiles, int count, float* out, size_t stride) const {
    static const auto product = QWEN_TILES(quant_stream_product);
    product(form_.format(), stored, tiles, count, out, stride);
  }

 private:
  const QuantForm form_;
  uint8_t* opened_ = nullptr;
};

}  // namespace qwen
