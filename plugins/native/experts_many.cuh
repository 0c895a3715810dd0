// Products of many visits with the packed matrices of their experts, on the tensor cores of compute capability 9.0, from fragments that are made in
// registers as in product_many.cuh. A block has 128 weight rows, four warps for each half, and four more warps that copy what the others use. Blocks stay
// and take tiles in turn: a tile of down rows is over after a few units, and the copies go on over the borders of tiles.
#pragma once

#include "packed_units.cuh"

namespace qwen {

constexpr int kExpertMultipliers = 256, kExpertCopiers = 128, kExpertThreads = kExpertMultipliers + kExpertCopiers;
constexpr int kExpertPanels = 8;  // panels of a tile's 128 weight rows

template <int BITS, bool GENERAL, int COLUMNS>
using ExpertUnit = PackedUnit<BITS, GENERAL, COLUMNS, kExpertPanels>;

// y[visit] = x[visit / sharing] w^T of the visit's expert. SWIGLU: w = [gate; up], y = silu(gate) * up, arranged for `bits`.
struct ExpertProduct {
  QuantMatrix w;  // that of the first expert
  const void* x;  // arranged
  void* y;        // [visits,N], of rows of `stride` elements
  int N, stride, across, sharing, bits;  // across: tiles of 128 weight rows
  // The visits from tiles[i + 1].y on of expert tiles[i + 1].x are multiplied together, COLUMNS at most, for i below tiles[0].x.
  const int2* tiles;
  const int *counts, *visits;
  int tokens;
};

template <int BITS, bool GENERAL, int COLUMNS>
struct ExpertLayout {
  using Unit = ExpertUnit<BITS, GENERAL, COLUMNS>;
  static constexpr int kBlocks = 2, kRoom = 109 << 10;  // blocks of a processor
  static constexpr int kFit = (kRoom - 1024) / int(sizeof(Unit)), kStages = kFit < 8 ? kFit : 8;
  static constexpr int kTilesKept = kStages + 2;  // a tile has one unit or more: so many are on their way, one is prepared, one is written
  static constexpr size_t kShared = sizeof(Unit) * kStages + 1024;
  static_assert(kStages >= 3, "copies must run ahead");
  static_assert(COLUMNS <= 64, "two blocks have registers for no more");
};

__device__ inline void copy16_to(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// What those who copy know of a tile, and those who multiply ask for.
template <int COLUMNS>
struct ExpertTile {
  int visits, row_at[COLUMNS], visit_of[COLUMNS];  // row_at: where a visit's row of x begins
};

template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
__global__ void __launch_bounds__(kExpertThreads, ExpertLayout<BITS, GENERAL, COLUMNS>::kBlocks) experts_many_kernel(const ExpertProduct given) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Layout = ExpertLayout<BITS, GENERAL, COLUMNS>;
  using Unit = typename Layout::Unit;
  constexpr int kStages = Layout::kStages, kTilesKept = Layout::kTilesKept, C = COLUMNS / 2;
  constexpr bool kHanded = C > 16;
  constexpr int kBytes = sizeof(Unit);
  extern __shared__ __align__(1024) uint8_t many_memory[];
  __shared__ __align__(8) uint64_t barriers[2 * kStages];
  __shared__ ExpertTile<COLUMNS> known[kTilesKept];
  const uint32_t ring = held((shared_of(many_memory) + 1023) / 1024 * 1024), full = held(shared_of(barriers)), empty = full + kStages * 8;
  const QuantMatrix& w = given.w;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = w.units();
  const int items = given.tiles[0].x * given.across;  // the tiles were made before the kernel that this one waits for
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) {
      barrier_init(full + i * 8, kExpertCopiers + 1);
      barrier_init(empty + i * 8, kExpertMultipliers / 32);
    }
    publish_barriers();
  }
  __syncthreads();
  int slot = 0, tile = 0;

  if (warp >= kExpertMultipliers / 32) {
    if constexpr (kHanded) give_registers<40>();
    const int own = threadIdx.x - kExpertMultipliers, piece = own % 16, stride = arranged_stride(w.K), panels = w.panels();
    int filled = 0, parity = 1;
    for (int item = blockIdx.x; item < items; item += gridDim.x, tile++) {
      const int2 visited = given.tiles[1 + item / given.across];
      const int column = item % given.across, e = visited.x, count = min(given.counts[e], given.tokens) - visited.y;
      ExpertTile<COLUMNS>& now = known[tile % kTilesKept];
      if (own < COLUMNS) {
        const int visit = own < count ? given.visits[size_t(e) * given.tokens + visited.y + own] : -1;
        now.visit_of[own] = visit, now.row_at[own] = visit < 0 ? -1 : visit / given.sharing * stride;
      }
      if (own == 0) now.visits = count;
      asm volatile("bar.sync 2, %0;" ::"n"(kExpertCopiers) : "memory");
      // SWIGLU: the first four are gates, the other four the ups that belong to them. The last tile may have too many panels: it reads some twice.
      const int half = panels / 2, four = kExpertPanels / 2;
      const int panel = SWIGLU ? min(column * four + own % four, half - 1) + own / four * half : min(column * kExpertPanels + own, panels - 1);
      const uint8_t* const packed = w.packed + size_t(e) * w.bytes() + size_t(panel) * w.panel_bytes();  // of the first threads
      for (int i = 0; i < units; i++) {
        if (filled == kStages)
          barrier_wait(empty + slot * 8, parity);
        else
          filled++;
        const uint32_t unit = ring + slot * kBytes;
        if (own < kExpertPanels) {
          const UnitParts parts(w, i);
          if (own == 0) barrier_expect(full + slot * 8, kExpertPanels * parts.bytes(w));
          parts.copy(w, packed, unit + sizeof(Unit::x) + own * Unit::kPart, full + slot * 8);
        }
        if (tile == 0 && i == 0) {
          wait_for_previous();
          let_next_start();
        }
        // A thread copies the same 8 k of every eighth row; rows eight further are swizzled alike. Where there is no visit nothing is copied: what is
        // there is multiplied, and nobody reads that column of the result.
        const uint32_t to = unit + swizzled(own / 16, piece, COLUMNS);
        const T* from = static_cast<const T*>(given.x) + piece * 8 + i * kUnit;
#pragma unroll 4
        for (int j = 0; j < COLUMNS / 8; j++) {
          const int at = now.row_at[own / 16 + j * 8];
          if (at >= 0) copy16_to(to + j * 1024, from + at);
        }
        barrier_arrive_after_copies(full + slot * 8);
        if (++slot == kStages) slot = 0, parity ^= 1;
      }
    }
  } else {
    if constexpr (kHanded) take_registers<96>();
    const int g = lane / 4, t = lane % 4;
    PackedFragments<T, Unit, SWIGLU, 1> products(w);
    const int whole = w.padded() / kUnit;  // units that have all of their k
    int parity = 0;
    // `used`: sums of a thread that are used, which are those of the first visits.
    const auto multiply_units = [&](auto& used) {
      constexpr int W = sizeof(used) / sizeof(float);
#pragma unroll
      for (int i = 0; i < W; i++) used[i] = 0.0f;
      for (int i = 0; i < units; i++) {
        barrier_wait(full + slot * 8, parity);
        publish_to_products();
        const uint32_t unit = ring + slot * kBytes;
        const auto before_is_read = [&] {
          if (i > 0 && lane == 0) barrier_arrive(empty + (slot == 0 ? kStages - 1 : slot - 1) * 8);
        };
        if (i < whole) {
          products.whole(used, unit, before_is_read);
        } else {  // the last unit ends early
          wait_for_products<0>();
          settle(used);
          before_is_read();
          for (int step = 0; step < w.padded() % kUnit / kStep; step++) products.part(used, unit, step);
        }
        if (++slot == kStages) slot = 0, parity ^= 1;
      }
      wait_for_products<0>();
      settle(used);
      if (lane == 0) barrier_arrive(empty + (slot == 0 ? kStages - 1 : slot - 1) * 8);
    };
    for (int item = blockIdx.x; item < items; item += gridDim.x, tile++) {
      barrier_wait(full + slot * 8, parity);  // then the tile is known
      const ExpertTile<COLUMNS>& now = known[tile % kTilesKept];
      const int visits = min(now.visits, COLUMNS), column = item % given.across;
      float c[C];
      constexpr int kThirtyTwo = C > 16 ? 16 : C;
      if (C > 8 && visits <= 16)
        multiply_units(reinterpret_cast<float(&)[8]>(c));
      else if (C > 16 && visits <= 32)
        multiply_units(reinterpret_cast<float(&)[kThirtyTwo]>(c));
      else
        multiply_units(c);
      wait_for_previous();
      // Of four sums of a thread [0], [1] are the first of its rows with visits 2t and 2t+1 of eight, [2], [3] the second.
      T* y = static_cast<T*>(given.y);
      const int n = SWIGLU ? (column * (kExpertPanels / 2) + warp / 2) * kPanelRows + warp % 2 * 8 + g : (column * kExpertPanels + warp) * kPanelRows + 2 * g;
      if (n >= given.N) continue;
#pragma unroll
      for (int eight = 0; eight < C / 4; eight++) {
        if (eight * 8 >= visits) break;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int local = eight * 8 + 2 * t + i;
          if (local >= visits) break;
          const size_t row = size_t(now.visit_of[local]) * given.stride;
          const float first = c[4 * eight + i], second = c[4 * eight + 2 + i];
          if constexpr (SWIGLU) {
            y[row + arranged_at(n, given.bits)] = from_float<T>(silu(first) * second);
          } else {
            Pack2<T> both;
            both.item[0] = from_float<T>(first), both.item[1] = from_float<T>(second);
            *reinterpret_cast<uint32_t*>(y + row + n) = both.bits;
          }
        }
      }
    }
  }
#endif
}

template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
void run_experts_many(ExpertProduct given, cudaStream_t stream) {
  using Layout = ExpertLayout<BITS, GENERAL, COLUMNS>;
  constexpr auto kernel = experts_many_kernel<T, BITS, GENERAL, COLUMNS, SWIGLU>;
  static DeviceFlags allowed;
  allowed.once([] { allow_shared(kernel, Layout::kShared); });
  const int panels = SWIGLU ? given.w.panels() / 2 : given.w.panels(), own = SWIGLU ? kExpertPanels / 2 : kExpertPanels;
  given.across = (panels + own - 1) / own;
  launch(kernel, dim3(Layout::kBlocks * multiprocessors()), dim3(kExpertThreads), Layout::kShared, stream, given);
}

}  // namespace qwen
