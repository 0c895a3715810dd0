// What kernels of many rows share: units of 128 k of packed weight rows with the activations that belong to them, in shared memory, and their products on
// the tensor cores of compute capability 9.0, from fragments that are made in registers.
#pragma once

#include "arrange.cuh"
#include "clusters.cuh"
#include "quant.cuh"
#include "quant_fragments.cuh"
#include "wgmma.cuh"

namespace qwen {

// What a block keeps of 128 k of PANELS panels. A panel's part is as it is in memory: scales, zeros, codes. FEWEST: bytes that the weights' place has at
// least, for other weights.
template <int BITS, bool GENERAL, int COLUMNS, int PANELS, int FEWEST = 0>
struct alignas(1024) PackedUnit {
  static constexpr int kBits = BITS, kColumns = COLUMNS, kPanels = PANELS;
  static constexpr bool kGeneral = GENERAL;
  static constexpr int kCodes = kUnit * kPanelRows * BITS / 8, kFront = kGroupBlocks * kPanelRows * (GENERAL ? 5 : 2), kPart = kFront + kCodes;
  uint8_t x[COLUMNS * kUnit * 2];  // two swizzled blocks of 64 k
  uint8_t weights[PANELS * kPart > FEWEST ? PANELS * kPart : FEWEST];
};

// The parts of all panels of a unit.
struct UnitParts {
  int group, inside, scales, zeros, codes, codes_from;  // the group and the block in it with which the unit begins; bytes; where its codes begin in the group
  bool together;                                        // a unit is a group, its parts follow each other

  __device__ UnitParts(const QuantMatrix& w, int unit) {
    const int first = unit * kUnit, k = min(kUnit, w.padded() - first), log_block = w.log_block(), block = first >> log_block, count = k >> log_block;
    group = block / kGroupBlocks, inside = block % kGroupBlocks, together = w.block == kUnit / kGroupBlocks;
    scales = count * kPanelRows * w.scale_bytes(), zeros = w.zeros ? count * kPanelRows : 0, codes = k * kPanelRows * w.bits / 8;
    codes_from = (first - (group * kGroupBlocks << log_block)) * (kPanelRows * w.bits / 8);
  }
  __device__ int bytes(const QuantMatrix& w) const { return together ? w.codes_at() + codes : scales + zeros + codes; }
  // One thread copies a panel's.
  __device__ void copy(const QuantMatrix& w, const uint8_t* panel, uint32_t into, uint32_t full) const {
    const uint8_t* from = panel + size_t(group) * w.group_bytes();
    if (together) return copy_bulk(into, from, w.codes_at() + codes, full);
    copy_bulk(into, from + inside * kPanelRows * w.scale_bytes(), scales, full);
    if (zeros > 0) copy_bulk(into + w.zeros_at(), from + w.zeros_at() + inside * kPanelRows, zeros, full);
    copy_bulk(into + w.codes_at(), from + w.codes_at() + codes_from, codes, full);
  }
};

// A warp's products of its rows with the activations of a unit, which is at a place in shared memory. Sums are not complete before
// `wait_for_products<0>` and `settle`. A fragment has two rows in each lane: neighbors of the warp's panel, or of SWIGLU a gate and its up, which is half
// the panels further. TOGETHER: steps of 32 k whose products are issued together; more take more registers.
template <typename T, typename Unit, bool SWIGLU, int TOGETHER>
struct PackedFragments {
  static constexpr int BITS = Unit::kBits, COLUMNS = Unit::kColumns;
  static constexpr bool GENERAL = Unit::kGeneral;
  static constexpr int kStepBytes = kStep * kPanelRows * BITS / 8, kUp = Unit::kPanels / 2 * Unit::kPart;
  const bool zeros, wide;
  const int zeros_at;
  uint32_t codes, scales, scale_of[kUnit / kStep];  // places in a unit: of a lane's codes and scales; of the scales of a step
  Weights<T, BITS, GENERAL> weights;
  uint32_t a[2][TOGETHER * 8];

  // Places are held in registers: the compiler would make them again for each unit.
  __device__ explicit PackedFragments(const QuantMatrix& w) : zeros(w.zeros), wide(w.wide_scales), zeros_at(w.zeros_at()) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, log_block = w.log_block();
    const int panel = SWIGLU ? warp / 2 : warp, row = SWIGLU ? warp % 2 * 8 + g : 2 * g;  // of the first of a lane's two rows
    scales = held(sizeof(Unit::x) + panel * Unit::kPart + (GENERAL ? 0 : row * 2));
    codes = held(sizeof(Unit::x) + panel * Unit::kPart + (GENERAL ? w.codes_at() : Unit::kFront) + t * (kStepBytes / 4) + row * 4);
#pragma unroll
    for (int i = 0; i < kUnit / kStep; i++) scale_of[i] = held((i * kStep >> log_block) * kPanelRows * (GENERAL ? 1 : 2) + (GENERAL ? row : 0));
  }

  __device__ static uint2 words(uint32_t at) {
    uint2 v;
    if constexpr (SWIGLU)
      asm volatile("ld.shared.u32 %0,[%2]; ld.shared.u32 %1,[%2+%3];" : "=r"(v.x), "=r"(v.y) : "r"(at), "n"(kUp));
    else
      asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
    return v;
  }
  __device__ void packed(uint32_t unit, int step, uint32_t* to) {
    const uint32_t at = unit + codes + step * kStepBytes;
    const uint2 v = words(at), next = BITS == 8 ? words(at + 64) : uint2{};
    if constexpr (GENERAL) {
      const uint8_t* first = reinterpret_cast<const uint8_t*>(__cvta_shared_to_generic(unit + scales));
      if constexpr (SWIGLU)
        weights.load_two(first, first + kUp, zeros_at, zeros, wide, scale_of[step]);
      else
        weights.load(first, zeros ? first + zeros_at : nullptr, wide, scale_of[step]);
    } else if constexpr (SWIGLU) {
      uint32_t both;
      asm volatile("{.reg .b16 low, high; ld.shared.b16 low,[%1]; ld.shared.b16 high,[%1+%2]; mov.b32 %0,{low,high};}"
                   : "=r"(both)
                   : "r"(unit + scales + scale_of[step]), "n"(kUp));
      weights.scale = as_half2(both);
    } else {
      uint32_t both;
      asm volatile("ld.shared.u32 %0,[%1];" : "=r"(both) : "r"(unit + scales + scale_of[step]));
      weights.scale = as_half2(both);
    }
    weights.of(v, next, to);
  }

  // Of 16 k of the activations.
  __device__ static uint64_t at_16(uint32_t low, int i) {
    return uint64_t(matrix_of(0, 16) >> 32) << 32 | (low + ((i / 4 * COLUMNS * 128 + i % 4 * 32) >> 4));
  }
  __device__ static uint32_t low_of(uint32_t unit) { return __shfl_sync(0xffffffffu, uint32_t(matrix_of(unit, 16)), 0); }

  // All products of the unit before are complete when `before_is_read` is called.
  template <int W, typename Read>
  __device__ void whole(float (&c)[W], uint32_t unit, const Read& before_is_read) {
    const uint32_t x = low_of(unit);
#pragma unroll
    for (int turn = 0; turn < kUnit / kStep / TOGETHER; turn++) {
      auto& now = a[turn % 2];
#pragma unroll
      for (int s = 0; s < TOGETHER; s++) packed(unit, turn * TOGETHER + s, now + s * 8);
      settle(now);
      begin_products();
#pragma unroll
      for (int s = 0; s < 2 * TOGETHER; s++) product_rows<T, W>(c, now + s * 4, at_16(x, turn * TOGETHER * 2 + s));
      end_products();
      wait_for_products<1>();
      settle(a[(turn + 1) % 2]);
      if (turn == 0) before_is_read();
    }
  }

  // 32 k alone.
  template <int W>
  __device__ void part(float (&c)[W], uint32_t unit, int step) {
    packed(unit, step, a[0]);
    alone(c, unit, step);
  }

 protected:
  template <int W>
  __device__ void alone(float (&c)[W], uint32_t unit, int step) {
    const uint32_t x = low_of(unit);
    settle(a[0]);
    begin_products();
#pragma unroll
    for (int s = 0; s < 2; s++) product_rows<T, W>(c, a[0] + s * 4, at_16(x, step * 2 + s));
    end_products();
    wait_for_products<0>();
    settle(c);
  }
};

}  // namespace qwen
