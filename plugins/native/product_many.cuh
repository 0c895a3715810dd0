// Products of many rows with packed matrices, on the tensor cores of compute capability 9.0. No copy of the weights is made in memory: four warps
// make fragments of 64 weight rows in registers and multiply them with the activations of up to 128 rows, which are in shared memory.
//
// A block has 128 weight rows, four warps for each half, and four more warps that copy what the others use, several units of 128 k ahead.
// Where rows are few, several blocks (`splits`, a cluster) take a part of K each, read each other's sums and add them in their order. The order of
// a sum depends on K and on the parts only, so a row has the same bits beside any other rows.
#pragma once

#include "arrange.cuh"
#include "clusters.cuh"
#include "device.cuh"
#include "panels.cuh"
#include "quant.cuh"
#include "quant_fragments.cuh"
#include "wgmma.cuh"

namespace qwen {

constexpr int kMultipliers = 256, kCopiers = 128, kManyThreads = kMultipliers + kCopiers;
constexpr int kTilePanels = 8;  // panels of a block's 128 weight rows

// y = x w^T + residual, x arranged (arrange.cuh). SWIGLU: w = [gate; up], y = silu(gate) * up.
struct ManyProduct {
  QuantMatrix w;
  const void *x, *residual;
  void* y;
  int M, N, stride, splits;  // y [M,N], of rows of `stride` elements
};

// What a block keeps of 128 k.
template <int BITS, bool GENERAL, int COLUMNS>
struct alignas(1024) ManyUnit {
  static constexpr int kCodes = kUnit * kPanelRows * BITS / 8, kScales = kGroupBlocks * kPanelRows * (GENERAL ? 4 : 2);
  uint8_t x[COLUMNS * kUnit * 2];  // two swizzled blocks of 64 k
  uint8_t codes[kTilePanels][kCodes];
  uint8_t scales[kTilePanels][kScales];
  uint8_t zeros[GENERAL ? kTilePanels : 1][GENERAL ? kGroupBlocks * kPanelRows : 1];
};

// Up to 64 rows leave a multiprocessor two blocks, which fill each other's gaps.
template <int BITS, bool GENERAL, int COLUMNS>
struct ManyLayout {
  using Unit = ManyUnit<BITS, GENERAL, COLUMNS>;
  static constexpr int kBlocks = COLUMNS <= 64 ? 2 : 1, kRoom = (kBlocks == 2 ? 111 : 224) << 10;
  static constexpr int kFit = (kRoom - 1024) / int(sizeof(Unit)), kStages = kFit < 8 ? kFit : 8;
  static constexpr size_t kShared = sizeof(Unit) * kStages + 1024;
  static_assert(kStages >= 3, "copies must run ahead");
};

__device__ inline void copy16_or_zeros_at(uint32_t shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(there ? 16 : 0) : "memory");
}

// A warp's products of its panel with the activations of a unit. Sums are not complete before `wait_for_products<0>` and `settle`.
template <typename T, int BITS, bool GENERAL, int COLUMNS>
struct PanelProducts {
  using Unit = ManyUnit<BITS, GENERAL, COLUMNS>;
  static constexpr int kTogether = 2;  // steps of 32 k whose products are issued together
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, log_block;
  const bool zeros, wide;
  Weights<T, BITS, GENERAL> weights;
  uint32_t a[2][kTogether * 8];

  __device__ explicit PanelProducts(const QuantMatrix& w) : log_block(w.block == 32 ? 5 : w.block == 64 ? 6 : 7), zeros(w.zeros), wide(w.wide_scales) {}

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

template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
__global__ void __launch_bounds__(kManyThreads, ManyLayout<BITS, GENERAL, COLUMNS>::kBlocks) product_many_kernel(const ManyProduct given) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Layout = ManyLayout<BITS, GENERAL, COLUMNS>;
  using Unit = typename Layout::Unit;
  constexpr int kStages = Layout::kStages;
  constexpr int C = COLUMNS / 2;                            // sums of a thread
  constexpr bool kHanded = Layout::kBlocks == 2 && C > 16;  // registers from those who copy to those who multiply
  extern __shared__ __align__(1024) uint8_t many_memory[];
  __shared__ __align__(8) uint64_t barriers[2 * kStages];
  __shared__ size_t panel_at[kTilePanels];
  const uint32_t base = (shared_of(many_memory) + 1023) / 1024 * 1024;
  uint8_t* const memory = many_memory + (base - shared_of(many_memory));
  Unit* const ring = reinterpret_cast<Unit*>(memory);
  const uint32_t full = shared_of(barriers), empty = full + kStages * 8;
  const QuantMatrix& w = given.w;
  const int M = given.M, first_row = blockIdx.y * COLUMNS;
  const int splits = given.splits, rank = blockIdx.x % splits, tile = blockIdx.x / splits;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int units = w.units(), first_unit = units * rank / splits, count = units * (rank + 1) / splits - first_unit;
  const int log_block = w.block == 32 ? 5 : w.block == 64 ? 6 : 7, panels = w.panels();
  if (threadIdx.x < kTilePanels) {
    // SWIGLU: the first four are gates, the other four the ups that belong to them. The last block may have too many panels: it reads some twice.
    const int p = threadIdx.x, half = panels / 2, own = kTilePanels / 2;
    const int panel = SWIGLU ? min(tile * own + p % own, half - 1) + p / own * half : min(tile * kTilePanels + p, panels - 1);
    panel_at[p] = size_t(panel) * w.panel_bytes();
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) {
      barrier_init(full + i * 8, kCopiers);
      barrier_init(empty + i * 8, kMultipliers / 32);
    }
    publish_barriers();
  }
  __syncthreads();

  if (warp >= kMultipliers / 32) {
    if constexpr (kHanded) give_registers<40>();
    const int own = threadIdx.x - kMultipliers, size = w.wide_scales ? 4 : 2;
    const auto copy_weights = [&](int i, int slot) {
      const int first = (first_unit + i) * kUnit, block = first >> log_block, group = block / kGroupBlocks, inside = block % kGroupBlocks;
      const int k = min(kUnit, w.padded() - first), blocks = k >> log_block;
      const uint8_t* at = w.packed + size_t(group) * w.group_bytes();
      const uint8_t* codes = at + w.codes_at() + (first - (group * kGroupBlocks << log_block)) * (kPanelRows * BITS / 8);
      Unit& unit = ring[slot];
      constexpr int kPieces = Unit::kCodes / 16;
#pragma unroll 4
      for (int j = 0; j < kTilePanels * kPieces / kCopiers; j++) {
        const int c = j * kCopiers + own, p = c / kPieces, piece = c % kPieces;
        if (piece < k * BITS / 8) copy16(unit.codes[p] + piece * 16, codes + panel_at[p] + piece * 16);
      }
      static_assert(kTilePanels * 16 == kCopiers, "a thread for each piece of scales");
      const int p = own / 16, piece = own % 16;
      if (piece < blocks * size) copy16(unit.scales[p] + piece * 16, at + panel_at[p] + inside * kPanelRows * size + piece * 16);
      if constexpr (GENERAL) {
        if (w.zeros && piece < blocks) copy16(unit.zeros[p] + piece * 16, at + panel_at[p] + w.zeros_at() + (inside + piece) * 16);
      }
    };
    for (int i = 0; i < min(kStages, count); i++) copy_weights(i, i);
    wait_for_previous();
    let_next_start();
    // A thread copies the same 8 k of every eighth row; rows eight further are swizzled alike.
    const int piece = own % 16, stride = arranged_stride(w.K);
    const T* x = static_cast<const T*>(given.x) + piece * 8 + size_t(min(first_row + own / 16, M - 1)) * stride;
    int slot = 0, parity = 1;
    for (int i = 0; i < count; i++) {
      if (i >= kStages) {
        barrier_wait(empty + slot * 8, parity);
        copy_weights(i, slot);
      }
      uint32_t to = shared_of(ring[slot].x) + swizzled(own / 16, piece, COLUMNS);
      const T* from = x + (first_unit + i) * kUnit;
      int left = M - first_row - own / 16;
#pragma unroll 4
      for (int j = 0; j < COLUMNS / 8; j++) {
        copy16_or_zeros_at(to, from, left > 0);
        left -= 8;
        if (left > 0) from += 8 * size_t(stride);
        to += 1024;
      }
      barrier_arrive_after_copies(full + slot * 8);
      if (++slot == kStages) slot = 0, parity ^= 1;
    }
  } else {
    if constexpr (kHanded) take_registers<96>();
    const int g = lane / 4, t = lane % 4;
    float c[C];
#pragma unroll
    for (int i = 0; i < C; i++) c[i] = 0.0f;
    PanelProducts<T, BITS, GENERAL, COLUMNS> products(w);
    const int whole = w.padded() / kUnit - first_unit;  // units that have all of their k
    int slot = 0, parity = 0, i = 0;
    for (; i < min(count, whole); i++) {
      barrier_wait(full + slot * 8, parity);
      publish_to_products();
      const Unit& unit = ring[slot];
      products.whole(c, unit, [&] {
        if (i > 0 && lane == 0) barrier_arrive(empty + (slot == 0 ? kStages - 1 : slot - 1) * 8);
      });
      if (++slot == kStages) slot = 0, parity ^= 1;
    }
    if (i < count) {  // the last unit ends early
      barrier_wait(full + slot * 8, parity);
      publish_to_products();
      products.part(c, ring[slot], w.padded() % kUnit / kStep);
    }
    wait_for_products<0>();
    settle(c);
    wait_for_previous();

    // Of four sums of a thread [0], [1] are row 2g of its panel with activation rows 2t and 2t+1 of eight, [2], [3] row 2g+1.
    const auto four = [&](int i) { return make_float4(c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3]); };
    const T* residual = static_cast<const T*>(given.residual);
    T* y = static_cast<T*>(given.y);
    const auto write = [&](int n, int eight, const float4& v) {
      if (n >= given.N) return;
      const float values[2][2] = {{v.x, v.z}, {v.y, v.w}};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int m = first_row + eight * 8 + 2 * t + i;
        if (m >= M) break;
        const size_t row = size_t(m) * given.stride;
        float first = values[i][0], second = values[i][1];
        if (residual != nullptr) first += to_float(residual[row + n]), second += to_float(residual[row + n + 1]);
        const T both[2] = {from_float<T>(first), from_float<T>(second)};
        *reinterpret_cast<uint32_t*>(y + row + n) = *reinterpret_cast<const uint32_t*>(both);
      }
    };
    if constexpr (!SWIGLU) {
      if (splits == 1) {
#pragma unroll
        for (int i = 0; i < C / 4; i++) write((tile * kTilePanels + warp) * kPanelRows + 2 * g, i, four(i));
        return;
      }
    }
    // Sums meet in shared memory, [2][C / 4][128] of four; what was copied there has been used.
    const auto sync = [] { asm volatile("bar.sync 1, %0;" ::"n"(kMultipliers) : "memory"); };
    float4* sums = reinterpret_cast<float4*>(memory);
    const int team = threadIdx.x / 128, member = threadIdx.x % 128;
    sync();
#pragma unroll
    for (int i = 0; i < C / 4; i++) sums[(team * (C / 4) + i) * 128 + member] = four(i);
    if (splits > 1) cluster_sync();
    else sync();
    const auto total = [&](int at) {
      if (splits == 1) return sums[at];
      float4 sum = make_float4(0, 0, 0, 0);
      for (int r = 0; r < splits; r++) {
        const float4 v = load_remote(base + at * 16, r);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      return sum;
    };
    constexpr int kParts = SWIGLU ? C / 4 : C / 2;
    for (int part = rank * 2 + team; part < kParts; part += splits * 2) {
      const int eight = part % (C / 4), half = part / (C / 4);
      if (first_row + eight * 8 >= M) continue;
      float4 v = total(part * 128 + member);
      if constexpr (SWIGLU) {
        const float4 up = total((part + kParts) * 128 + member);
        v = make_float4(silu(v.x) * up.x, silu(v.y) * up.y, silu(v.z) * up.z, silu(v.w) * up.w);
      }
      write((tile * (SWIGLU ? 4 : kTilePanels) + half * 4 + warp % 4) * kPanelRows + 2 * g, eight, v);
    }
    if (splits > 1) cluster_sync();  // nobody leaves while another reads its sums
  }
#endif
}

// Whether the kernels are there and the device has what they need.
inline bool has_tensor_cores_90() {
#ifdef QWEN_SM90A
  static const bool able = [] {
    int device = 0, major = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    return major == 9;
  }();
  return able;
#else
  return false;
#endif
}

// Blocks that have a tile of their own, for as many rows as one block takes.
inline int many_tiles(const QuantMatrix& w, bool swiglu) { return swiglu ? (w.panels() / 2 + 3) / 4 : (w.panels() + kTilePanels - 1) / kTilePanels; }

template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
void run_many(const ManyProduct& given, cudaStream_t stream) {
  constexpr auto kernel = product_many_kernel<T, BITS, GENERAL, COLUMNS, SWIGLU>;
  constexpr size_t shared = ManyLayout<BITS, GENERAL, COLUMNS>::kShared;
  static DeviceFlags allowed;
  allowed.once([] { allow_shared(kernel, shared); });
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = given.splits, attributes[1].val.clusterDim.y = 1, attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(many_tiles(given.w, SWIGLU) * given.splits, (given.M + COLUMNS - 1) / COLUMNS);
  config.blockDim = dim3(kManyThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = given.splits > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, given), "cudaLaunchKernelEx");
}

}  // namespace qwen
