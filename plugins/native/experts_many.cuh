// Products of many visits with the packed matrices of their experts, on the tensor cores of compute capability 9.0, from fragments that are made in
// registers as in product_many.cuh. A block has 128 weight rows, four warps for each half, and four more warps that copy what the others use. Blocks stay
// and take tiles in turn: a tile of down rows is over after a few units, and the copies go on over the borders of tiles.
#pragma once

#include "arrange.cuh"
#include "clusters.cuh"
#include "device.cuh"
#include "panels.cuh"
#include "quant.cuh"
#include "quant_fragments.cuh"
#include "wgmma.cuh"

namespace qwen {

constexpr int kExpertMultipliers = 256, kExpertCopiers = 128, kExpertThreads = kExpertMultipliers + kExpertCopiers;
constexpr int kExpertPanels = 8;  // panels of a tile's 128 weight rows

// What a block keeps of 128 k.
template <int BITS, bool GENERAL, int COLUMNS>
struct alignas(1024) ExpertUnit {
  static constexpr int kCodes = kUnit * kPanelRows * BITS / 8, kScales = kGroupBlocks * kPanelRows * (GENERAL ? 4 : 2);
  uint8_t x[COLUMNS * kUnit * 2];  // two swizzled blocks of 64 k
  uint8_t codes[kExpertPanels][kCodes];
  uint8_t scales[kExpertPanels][kScales];
  uint8_t zeros[GENERAL ? kExpertPanels : 1][GENERAL ? kGroupBlocks * kPanelRows : 1];
};

// A warp's products of its panel with the activations of a unit. Sums are not complete before `wait_for_products<0>` and `settle`.
template <typename T, int BITS, bool GENERAL, int COLUMNS>
struct ExpertFragments {
  using Unit = ExpertUnit<BITS, GENERAL, COLUMNS>;
  static constexpr int kTogether = 2;  // steps of 32 k whose products are issued together
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, log_block;
  const bool zeros, wide;
  Weights<T, BITS, GENERAL> weights;
  uint32_t a[2][kTogether * 8];

  __device__ explicit ExpertFragments(const QuantMatrix& w) : log_block(w.block == 32 ? 5 : w.block == 64 ? 6 : 7), zeros(w.zeros), wide(w.wide_scales) {}

  __device__ void fragments(const Unit& unit, int step, uint32_t* to) {
    weights.load(unit.scales[warp], GENERAL && zeros ? unit.zeros[GENERAL ? warp : 0] : nullptr, wide, (step * kStep >> log_block) * kPanelRows + 2 * g);
    uint2 v, next{};
    if constexpr (BITS == 4) {
      v = *reinterpret_cast<const uint2*>(unit.codes[warp] + step * 256 + t * 64 + g * 8);
    } else {
      v = *reinterpret_cast<const uint2*>(unit.codes[warp] + step * 512 + t * 128 + g * 8);
      next = *reinterpret_cast<const uint2*>(unit.codes[warp] + step * 512 + t * 128 + 64 + g * 8);
    }
    weights.of(v, next, to);
  }

  __device__ static uint64_t at_16(uint64_t x, int i) { return x + ((i / 4 * COLUMNS * 128 + i % 4 * 32) >> 4); }

  // `used` is what the first 2 C of COLUMNS rows need. All products of the unit before are complete when `before_is_read` is called.
  template <int C, typename Read>
  __device__ void whole(float (&used)[C], const Unit& unit, const Read& before_is_read) {
    const uint64_t x = matrix_of(shared_of(unit.x), 16);
#pragma unroll
    for (int turn = 0; turn < kUnit / kStep / kTogether; turn++) {
      auto& now = a[turn % 2];
#pragma unroll
      for (int s = 0; s < kTogether; s++) fragments(unit, turn * kTogether + s, now + s * 8);
      settle(now);
      begin_products();
#pragma unroll
      for (int s = 0; s < 2 * kTogether; s++) product_rows<T, C>(used, now + s * 4, at_16(x, turn * kTogether * 2 + s));
      end_products();
      wait_for_products<1>();
      settle(a[(turn + 1) % 2]);
      if (turn == 0) before_is_read();
    }
  }

  // A unit that ends after `steps` of 32 k.
  template <int C>
  __device__ void part(float (&used)[C], const Unit& unit, int steps) {
    const uint64_t x = matrix_of(shared_of(unit.x), 16);
    for (int step = 0; step < steps; step++) {
      wait_for_products<0>();
      settle(used);
      fragments(unit, step, a[0]);
      settle(a[0]);
      begin_products();
#pragma unroll
      for (int s = 0; s < 2; s++) product_rows<T, C>(used, a[0] + s * 4, at_16(x, step * 2 + s));
      end_products();
    }
  }
};

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

template <int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
struct ExpertLayout {
  using Unit = ExpertUnit<BITS, GENERAL, COLUMNS>;
  static constexpr int kBlocks = COLUMNS <= 64 ? 2 : 1, kRoom = (kBlocks == 2 ? 109 : 220) << 10;
  static constexpr int kSums = SWIGLU ? COLUMNS / 8 * 128 * 16 : 0;  // of the up rows, on their way to the gates
  static constexpr int kFit = (kRoom - 1024 - kSums) / int(sizeof(Unit)), kStages = kFit < 8 ? kFit : 8;
  static constexpr int kTilesKept = kStages + 2;  // a tile has one unit or more: so many are on their way, one is prepared, one is written
  static constexpr size_t kShared = sizeof(Unit) * kStages + kSums + 1024;
  static_assert(kStages >= 3, "copies must run ahead");
};

__device__ inline void copy16_to(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

template <int N>
struct Width {
  static constexpr int value = N;
};

// What those who copy know of a tile, and those who multiply ask for.
template <int COLUMNS>
struct ExpertTile {
  int visits, row_at[COLUMNS], visit_of[COLUMNS];  // row_at: where a visit's row of x begins
};

template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
__global__ void __launch_bounds__(kExpertThreads, ExpertLayout<BITS, GENERAL, COLUMNS, SWIGLU>::kBlocks) experts_many_kernel(const ExpertProduct given) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Layout = ExpertLayout<BITS, GENERAL, COLUMNS, SWIGLU>;
  using Unit = typename Layout::Unit;
  constexpr int kStages = Layout::kStages, kTilesKept = Layout::kTilesKept, C = COLUMNS / 2;
  constexpr bool kHanded = Layout::kBlocks == 2 && C > 16;
  extern __shared__ __align__(1024) uint8_t many_memory[];
  __shared__ __align__(8) uint64_t barriers[2 * kStages];
  __shared__ ExpertTile<COLUMNS> known[kTilesKept];
  const uint32_t base = (shared_of(many_memory) + 1023) / 1024 * 1024;
  uint8_t* const memory = many_memory + (base - shared_of(many_memory));
  Unit* const ring = reinterpret_cast<Unit*>(memory);
  const uint32_t full = shared_of(barriers), empty = full + kStages * 8;
  const QuantMatrix& w = given.w;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = w.units(), panels = w.panels(), log_block = w.block == 32 ? 5 : w.block == 64 ? 6 : 7;
  const int items = given.tiles[0].x * given.across;  // the tiles were made before the kernel that this one waits for
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) {
      barrier_init(full + i * 8, kExpertCopiers);
      barrier_init(empty + i * 8, kExpertMultipliers / 32);
    }
    publish_barriers();
  }
  __syncthreads();
  int slot = 0, tile = 0;

  if (warp >= kExpertMultipliers / 32) {
    if constexpr (kHanded) give_registers<40>();
    const int own = threadIdx.x - kExpertMultipliers, size = w.wide_scales ? 4 : 2, piece = own % 16, stride = arranged_stride(w.K);
    constexpr int kPieces = Unit::kCodes / 16;
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
      const auto panel_at = [&](int p) {
        const int half = panels / 2, four = kExpertPanels / 2;
        return size_t(SWIGLU ? min(column * four + p % four, half - 1) + p / four * half : min(column * kExpertPanels + p, panels - 1)) * w.panel_bytes();
      };
      const uint8_t* const packed = w.packed + size_t(e) * w.bytes();
      const uint8_t* const scales_at = packed + panel_at(own / 16);
      for (int i = 0; i < units; i++) {
        if (filled == kStages)
          barrier_wait(empty + slot * 8, parity);
        else
          filled++;
        const int first = i * kUnit, block = first >> log_block, group = block / kGroupBlocks, inside = block % kGroupBlocks;
        const int k = min(kUnit, w.padded() - first), blocks = k >> log_block;
        const size_t codes = size_t(group) * w.group_bytes() + w.codes_at() + (first - (group * kGroupBlocks << log_block)) * (kPanelRows * BITS / 8);
        Unit& unit = ring[slot];
#pragma unroll
        for (int j = 0; j < kExpertPanels * kPieces / kExpertCopiers; j++) {
          const int c = j * kExpertCopiers + own, p = c / kPieces, at = c % kPieces;
          if (at < k * BITS / 8) copy16(unit.codes[p] + at * 16, packed + panel_at(p) + codes + at * 16);
        }
        const uint8_t* scales = scales_at + size_t(group) * w.group_bytes();
        if (piece < blocks * size) copy16(unit.scales[own / 16] + piece * 16, scales + inside * kPanelRows * size + piece * 16);
        if constexpr (GENERAL) {
          if (w.zeros && piece < blocks) copy16(unit.zeros[own / 16] + piece * 16, scales + w.zeros_at() + (inside + piece) * 16);
        }
        if (tile == 0 && i == 0) {
          wait_for_previous();
          let_next_start();
        }
        // A thread copies the same 8 k of every eighth row; rows eight further are swizzled alike. Where there is no visit nothing is copied: what is
        // there is multiplied, and nobody reads that column of the result.
        const uint32_t to = shared_of(unit.x) + swizzled(own / 16, piece, COLUMNS);
        const T* from = static_cast<const T*>(given.x) + piece * 8 + first;
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
    const int g = lane / 4, t = lane % 4, team = threadIdx.x / 128, member = threadIdx.x % 128;
    float4* const sums = reinterpret_cast<float4*>(memory + sizeof(Unit) * kStages);  // [C / 4][128]
    const auto sync = [] { asm volatile("bar.sync 1, %0;" ::"n"(kExpertMultipliers) : "memory"); };
    float c[C];
    ExpertFragments<T, BITS, GENERAL, COLUMNS> products(w);
    const int whole = w.padded() / kUnit;  // units that have all of their k
    int parity = 0;
    // `width`: sums of a thread that are used, which are those of the first visits.
    const auto multiply_units = [&](auto width) {
      constexpr int W = decltype(width)::value;
      float(&used)[W] = reinterpret_cast<float(&)[W]>(c);
#pragma unroll
      for (int i = 0; i < W; i++) used[i] = 0.0f;
      for (int i = 0; i < units; i++) {
        barrier_wait(full + slot * 8, parity);
        publish_to_products();
        const Unit& unit = ring[slot];
        const auto before_is_read = [&] {
          if (i > 0 && lane == 0) barrier_arrive(empty + (slot == 0 ? kStages - 1 : slot - 1) * 8);
        };
        if (i < whole) {
          products.whole(used, unit, before_is_read);
        } else {  // the last unit ends early
          wait_for_products<0>();
          before_is_read();
          products.part(used, unit, w.padded() % kUnit / kStep);
        }
        if (++slot == kStages) slot = 0, parity ^= 1;
      }
      wait_for_products<0>();
      settle(c);
      if (lane == 0) barrier_arrive(empty + (slot == 0 ? kStages - 1 : slot - 1) * 8);
    };
    for (int item = blockIdx.x; item < items; item += gridDim.x, tile++) {
      barrier_wait(full + slot * 8, parity);  // then the tile is known
      const ExpertTile<COLUMNS>& now = known[tile % kTilesKept];
      const int visits = min(now.visits, COLUMNS), column = item % given.across;
      constexpr int kThirtyTwo = C > 16 ? 16 : C, kSixtyFour = C > 32 ? 32 : C;
      if (C > 8 && visits <= 16)
        multiply_units(Width<8>{});
      else if (C > 16 && visits <= 32)
        multiply_units(Width<kThirtyTwo>{});
      else if (C > 32 && visits <= 64)
        multiply_units(Width<kSixtyFour>{});
      else
        multiply_units(Width<C>{});
      wait_for_previous();
      // Of four sums of a thread [0], [1] are row 2g of its panel with visits 2t and 2t+1 of eight, [2], [3] row 2g+1.
      T* y = static_cast<T*>(given.y);
      if constexpr (SWIGLU) {
        sync();  // the gates have read the sums of the tile before
        if (team == 1) {
#pragma unroll
          for (int i = 0; i < C / 4; i++) {
            if (i * 8 < visits) sums[i * 128 + member] = make_float4(c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3]);
          }
        }
        sync();
        if (team == 1) continue;
      }
      const int n = ((SWIGLU ? column * (kExpertPanels / 2) : column * kExpertPanels) + warp) * kPanelRows + 2 * g;
      if (n >= given.N) continue;
#pragma unroll
      for (int eight = 0; eight < C / 4; eight++) {
        if (eight * 8 >= visits) break;
        float values[4] = {c[4 * eight], c[4 * eight + 1], c[4 * eight + 2], c[4 * eight + 3]};
        if constexpr (SWIGLU) {
          const float4 up = sums[eight * 128 + member];
          values[0] = silu(values[0]) * up.x, values[1] = silu(values[1]) * up.y, values[2] = silu(values[2]) * up.z, values[3] = silu(values[3]) * up.w;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int local = eight * 8 + 2 * t + i;
          if (local >= visits) break;
          const size_t row = size_t(now.visit_of[local]) * given.stride;
          const T both[2] = {from_float<T>(values[i]), from_float<T>(values[2 + i])};
          if constexpr (SWIGLU) {
            y[row + arranged_at(n, given.bits)] = both[0];
            y[row + arranged_at(n + 1, given.bits)] = both[1];
          } else {
            *reinterpret_cast<uint32_t*>(y + row + n) = *reinterpret_cast<const uint32_t*>(both);
          }
        }
      }
    }
  }
#endif
}

template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
void run_experts_many(ExpertProduct given, cudaStream_t stream) {
  using Layout = ExpertLayout<BITS, GENERAL, COLUMNS, SWIGLU>;
  constexpr auto kernel = experts_many_kernel<T, BITS, GENERAL, COLUMNS, SWIGLU>;
  static DeviceFlags allowed;
  allowed.once([] { allow_shared(kernel, Layout::kShared); });
  const int panels = SWIGLU ? given.w.panels() / 2 : given.w.panels(), own = SWIGLU ? kExpertPanels / 2 : kExpertPanels;
  given.across = (panels + own - 1) / own;
  launch(kernel, dim3(Layout::kBlocks * multiprocessors()), dim3(kExpertThreads), Layout::kShared, stream, given);
}

}  // namespace qwen
