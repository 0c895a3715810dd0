// What a product of many rows (product_many.cuh) is given, how its blocks share it out, and how they copy what they multiply: units of 128 k of a tile of
// weight rows, with the activations that belong to them.
#pragma once

#include "packed_units.cuh"

namespace qwen {

constexpr int kTeamThreads = 128, kCopiers = 4;  // copiers: warps
constexpr int kTailPitch = kUnit * 2 + 16;       // bytes of a plain row in shared memory, which meet different banks

// How a block is made for COLUMNS activation rows: a team of four warps has 64 weight rows and sums for all of COLUMNS. Of more than 128 there are so
// many sums that registers are enough for two teams. Where they are scarce the copiers hand over theirs.
template <int COLUMNS>
struct ManyTeams {
  static constexpr bool kHanded = COLUMNS >= 128;
  static constexpr int kTeams = COLUMNS > 128 ? 2 : 3, kTaken = kTeams == 2 ? 232 : 152, kLeft = kTeams == 2 ? 40 : 56;  // registers
  // Registers that nobody has given are waited for without end.
  static_assert(!kHanded || (kTeams * kTaken + kLeft) * kTeamThreads <= (kTeams == 2 ? 3 * 168 : 4 * 128) * kTeamThreads, "a block has no more registers");
  static constexpr int kMultipliers = kTeams * kTeamThreads, kThreads = kMultipliers + kCopiers * 32;
  static constexpr int kTilePanels = 4 * kTeams, kTailRows = COLUMNS > 192 ? 32 : 64;  // of a tile of packed rows; of plain rows
};

// y = x [w; tail]^T + residual, x arranged in blocks (arrange.cuh). SWIGLU: w = [gate; up], y = silu(gate) * up.
struct ManyProduct {
  QuantMatrix w;
  const void *x, *tail, *residual;
  void* y;
  int M, N, tail_rows, stride;  // y [M,N+tail_rows], of rows of `stride` elements
  int x_rows;                   // rows that x has room for
  int tiles, all_tiles, items;  // of w, and with those of the tail; these for each COLUMNS rows
  int splits;                   // blocks that share a tile, a cluster
};

template <int BITS, bool GENERAL, int COLUMNS>
using ManyUnit = PackedUnit<BITS, GENERAL, COLUMNS, ManyTeams<COLUMNS>::kTilePanels, ManyTeams<COLUMNS>::kTailRows * kTailPitch>;

template <int BITS, bool GENERAL, int COLUMNS>
struct ManyLayout {
  using Unit = ManyUnit<BITS, GENERAL, COLUMNS>;
  static constexpr int kFit = ((226 << 10) - 1024) / int(sizeof(Unit)), kStages = kFit < 8 ? kFit : 8;
  static constexpr size_t kShared = sizeof(Unit) * kStages + 1024;
  static_assert(kStages >= 3, "copies must run ahead");
};

// A block's work: units `first` to `first + count - 1` of items item, item + step, ...
struct ManyShare {
  int item, step, first, count, rank;
  __device__ explicit ManyShare(const ManyProduct& given) {
    const int units = given.w.units();
    rank = blockIdx.x % given.splits, item = blockIdx.x / given.splits, step = gridDim.x / given.splits;
    first = units * rank / given.splits, count = units * (rank + 1) / given.splits - first;
  }
};

// A tile, and the activation rows that it meets.
template <int COLUMNS>
struct ManyItem {
  int tile, first_row, rows;
  __device__ ManyItem(const ManyProduct& given, int item) {
    tile = item % given.all_tiles, first_row = item / given.all_tiles * COLUMNS, rows = min(COLUMNS, given.M - first_row);
  }
  __device__ int x_bytes() const { return (rows + 7) / 8 * 1024; }  // of 64 k
};

// One of the warps that copy: each has some panels of each unit, the first two a half of the activations. A warp begins its copies one by one, which takes
// longer than they do.
template <int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
struct ManyCopier {
  using Unit = ManyUnit<BITS, GENERAL, COLUMNS>;
  using Item = ManyItem<COLUMNS>;
  static constexpr int kTilePanels = Unit::kPanels, kTailRows = ManyTeams<COLUMNS>::kTailRows;
  const ManyProduct& given;
  const QuantMatrix& w = given.w;
  const int lane = threadIdx.x % 32, copier = threadIdx.x / 32 - ManyTeams<COLUMNS>::kMultipliers / 32;

  __device__ size_t panel_of(int tile, int p) const {
    // SWIGLU: the first half are gates, the others the ups that belong to them. The last tile may have too many panels: it reads some twice.
    const int panels = w.panels(), half = panels / 2, own = kTilePanels / 2;
    return SWIGLU ? min(tile * own + p % own, half - 1) + p / own * half : min(tile * kTilePanels + p, panels - 1);
  }
  // Also makes the barrier expect all of the unit's bytes.
  __device__ void weights(const Item& item, int unit, uint32_t to, uint32_t full) const {
    const int first = unit * kUnit, tile = item.tile, x_bytes = item.x_bytes();
    to += sizeof(Unit::x);
    if (tile >= given.tiles) {
      const int bytes = min(kUnit, w.K - first) * 2;
      if (lane == 0 && copier == 0) barrier_expect(full, kTailRows * bytes + 2 * x_bytes);
      if (lane < kTailRows / kCopiers) {
        const int r = copier * (kTailRows / kCopiers) + lane, row = min((tile - given.tiles) * kTailRows + r, given.tail_rows - 1);
        copy_bulk(to + r * kTailPitch, static_cast<const uint8_t*>(given.tail) + (size_t(row) * w.K + first) * 2, bytes, full);
      }
      return;
    }
    const UnitParts parts(w, unit);
    if (lane == 0 && copier == 0) barrier_expect(full, kTilePanels * parts.bytes(w) + 2 * x_bytes);
    if (lane >= kTilePanels / kCopiers) return;
    const int p = copier * (kTilePanels / kCopiers) + lane;
    parts.copy(w, w.packed + panel_of(tile, p) * w.panel_bytes(), to + p * Unit::kPart, full);
  }
  __device__ void activations(const Item& item, int unit, uint32_t to, uint32_t full) const {
    if (copier >= 2 || lane > 0) return;
    const uint8_t* x = static_cast<const uint8_t*>(given.x) + (size_t(unit * 2 + copier) * given.x_rows + item.first_row) * 128;
    copy_bulk(to + copier * COLUMNS * 128, x, item.x_bytes(), full);
  }
};

}  // namespace qwen
