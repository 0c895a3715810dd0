// What a product of many rows (product_many.cuh) is given, how its blocks share it out, and how they copy what they multiply: units of 128 k of a tile of
// weight rows, with the activations that belong to them.
#pragma once

#include "arrange.cuh"
#include "clusters.cuh"
#include "quant.cuh"

namespace qwen {

constexpr int kTeams = 3, kTeamThreads = 128, kMultipliers = kTeams * kTeamThreads;
constexpr int kCopiers = 4, kManyThreads = kMultipliers + kCopiers * 32;  // copiers: warps
constexpr int kTilePanels = 4 * kTeams;                                   // of a tile of packed rows
constexpr int kTailRows = 64, kTailPitch = kUnit * 2 + 16;  // of a tile of plain rows; bytes of a row in shared memory, which meet different banks

// y = x [w; tail]^T + residual, x arranged in blocks (arrange.cuh). SWIGLU: w = [gate; up], y = silu(gate) * up.
struct ManyProduct {
  QuantMatrix w;
  const void *x, *tail, *residual;
  void* y;
  int M, N, tail_rows, stride;   // y [M,N+tail_rows], of rows of `stride` elements; M is at most COLUMNS
  int x_rows, first_row;         // rows that x has room for, and the first of them that counts
  int tiles, all_tiles, splits;  // of w, and with those of the tail; blocks that share a tile, a cluster
};

// What a block keeps of 128 k. A panel's part is as it is in memory: scales, zeros, codes.
template <int BITS, bool GENERAL, int COLUMNS>
struct alignas(1024) ManyUnit {
  static constexpr int kCodes = kUnit * kPanelRows * BITS / 8, kFront = kGroupBlocks * kPanelRows * (GENERAL ? 5 : 2), kPart = kFront + kCodes;
  static constexpr int kRoom = kTilePanels * kPart > kTailRows * kTailPitch ? kTilePanels * kPart : kTailRows * kTailPitch;
  uint8_t x[COLUMNS * kUnit * 2];  // two swizzled blocks of 64 k
  uint8_t weights[kRoom];          // a part for each panel
};

template <int BITS, bool GENERAL, int COLUMNS>
struct ManyLayout {
  using Unit = ManyUnit<BITS, GENERAL, COLUMNS>;
  static constexpr int kFit = ((226 << 10) - 1024) / int(sizeof(Unit)), kStages = kFit < 8 ? kFit : 8;
  static constexpr size_t kShared = sizeof(Unit) * kStages + 1024;
  static_assert(kStages >= 3, "copies must run ahead");
};

// A block's work: units `first` to `first + count - 1` of its tiles, which are tile, tile + step, ...
struct ManyShare {
  int tile, step, first, count, rank;
  __device__ explicit ManyShare(const ManyProduct& given) {
    const int units = given.w.units();
    rank = blockIdx.x % given.splits, tile = blockIdx.x / given.splits, step = gridDim.x / given.splits;
    first = units * rank / given.splits, count = units * (rank + 1) / given.splits - first;
  }
};

// One of the warps that copy: each has some panels of each unit, the first two a half of the activations. A warp begins its copies one by one, which takes
// longer than they do.
template <int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
struct ManyCopier {
  using Unit = ManyUnit<BITS, GENERAL, COLUMNS>;
  const ManyProduct& given;
  const QuantMatrix& w = given.w;
  const int lane = threadIdx.x % 32, copier = threadIdx.x / 32 - kMultipliers / 32, log_block = w.log_block(), x_bytes = (given.M + 7) / 8 * 1024;

  __device__ size_t panel_of(int tile, int p) const {
    // SWIGLU: the first half are gates, the others the ups that belong to them. The last tile may have too many panels: it reads some twice.
    const int panels = w.panels(), half = panels / 2, own = kTilePanels / 2;
    return SWIGLU ? min(tile * own + p % own, half - 1) + p / own * half : min(tile * kTilePanels + p, panels - 1);
  }
  // Also makes the barrier expect all of the unit's bytes.
  __device__ void weights(int tile, int unit, uint32_t to, uint32_t full) const {
    const int first = unit * kUnit;
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
    const int k = min(kUnit, w.padded() - first), block = first >> log_block, group = block / kGroupBlocks, inside = block % kGroupBlocks;
    const int codes = k * kPanelRows * BITS / 8, count = k >> log_block, scales = count * kPanelRows * w.scale_bytes(), zeros = w.zeros ? count * kPanelRows : 0;
    const bool together = w.block == kUnit / kGroupBlocks;  // a unit is a group, its parts follow each other
    const int part = together ? w.codes_at() + codes : scales + zeros + codes;
    if (lane == 0 && copier == 0) barrier_expect(full, kTilePanels * part + 2 * x_bytes);
    if (lane >= kTilePanels / kCopiers) return;
    const int p = copier * (kTilePanels / kCopiers) + lane;
    const uint8_t* from = w.packed + panel_of(tile, p) * w.panel_bytes() + size_t(group) * w.group_bytes();
    const uint32_t into = to + p * Unit::kPart;
    if (together) return copy_bulk(into, from, part, full);
    copy_bulk(into, from + inside * kPanelRows * w.scale_bytes(), scales, full);
    if (zeros > 0) copy_bulk(into + w.zeros_at(), from + w.zeros_at() + inside * kPanelRows, zeros, full);
    copy_bulk(into + w.codes_at(), from + w.codes_at() + (first - (group * kGroupBlocks << log_block)) * (kPanelRows * BITS / 8), codes, full);
  }
  __device__ void activations(int unit, uint32_t to, uint32_t full) const {
    if (copier >= 2 || lane > 0) return;
    const uint8_t* x = static_cast<const uint8_t*>(given.x) + (size_t(unit * 2 + copier) * given.x_rows + given.first_row) * 128;
    copy_bulk(to + copier * COLUMNS * 128, x, x_bytes, full);
  }
};

}  // namespace qwen
