// Products of many rows with packed matrices, on the tensor cores of compute capability 9.0. No copy of the weights is made in memory: four warps
// make fragments of 64 weight rows in registers and multiply them with the activations of up to 128 rows, which are in shared memory.
//
// A multiprocessor has one block: three teams of four warps, and warps that copy what they use, units of 128 k of a tile of 192 weight rows. Where there
// are more tiles than processors blocks take tiles in turn, and copies go on over their borders. Where there are fewer, several blocks (`splits`) take a
// part of K each, as a cluster, and each adds up the sums of all for some activation rows, in the order of k. The order of a sum depends on the matrix
// alone, so a row has the same bits beside any other rows.
//
// Neither this kernel nor the one that arranges waits before it lets the next one start (device.cuh). The weights of the next product are therefore
// on their way as soon as a processor has no block of this one.
#pragma once

#include "many_units.cuh"
#include "quant_fragments.cuh"
#include "wgmma.cuh"

namespace qwen {

// A warp's products of its rows with the activations of a unit, which is at a place in shared memory. Sums are not complete before
// `wait_for_products<0>` and `settle`. A fragment has two rows in each lane: neighbors of the warp's panel, or of SWIGLU a gate and its up.
template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
struct ManyFragments {
  using Unit = ManyUnit<BITS, GENERAL, COLUMNS>;
  static constexpr int C = COLUMNS / 2, kTogether = 2;  // sums of a thread; steps of 32 k whose products are issued together
  static constexpr int kStepBytes = kStep * kPanelRows * BITS / 8, kUp = kTilePanels / 2 * Unit::kPart;
  const int K;
  const bool zeros, wide;
  int zeros_at;
  uint32_t codes, scales, tail, scale_of[kUnit / kStep];  // places in a unit: of a lane's codes, scales and plain values; of the scales of a step
  Weights<T, BITS, GENERAL> weights;
  uint32_t a[2][kTogether * 8];

  // Places are held in registers: the compiler would make them again for each unit.
  __device__ explicit ManyFragments(const QuantMatrix& w) : K(w.K), zeros(w.zeros), wide(w.wide_scales), zeros_at(w.zeros_at()) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, log_block = w.log_block();
    const int panel = SWIGLU ? warp / 2 : warp, row = SWIGLU ? warp % 2 * 8 + g : 2 * g;  // of the first of a lane's two rows
    scales = held(sizeof(Unit::x) + panel * Unit::kPart + (GENERAL ? 0 : row * 2));
    codes = held(sizeof(Unit::x) + panel * Unit::kPart + (GENERAL ? w.codes_at() : Unit::kFront) + t * (kStepBytes / 4) + row * 4);
    tail = sizeof(Unit::x) + (warp % 4 * kPanelRows + 2 * g) * kTailPitch + t * 16;
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
  // Of a unit of the tail, from k on. Behind K there is nothing.
  __device__ void plain(uint32_t unit, int step, int k, uint32_t* to) const {
    const auto* at = reinterpret_cast<const uint8_t*>(__cvta_shared_to_generic(unit + tail)) + step * 64;
    uint4 x{}, y{};
    if (k + step * kStep + int(threadIdx.x % 4) * 8 < K) x = *reinterpret_cast<const uint4*>(at), y = *reinterpret_cast<const uint4*>(at + kTailPitch);
    x = pairs_of<BITS>(x), y = pairs_of<BITS>(y);
    to[0] = x.x, to[1] = y.x, to[2] = x.y, to[3] = y.y, to[4] = x.z, to[5] = y.z, to[6] = x.w, to[7] = y.w;
  }

  // Of 16 k of the activations.
  __device__ static uint64_t at_16(uint32_t low, int i) {
    return uint64_t(matrix_of(0, 16) >> 32) << 32 | (low + ((i / 4 * COLUMNS * 128 + i % 4 * 32) >> 4));
  }
  __device__ static uint32_t low_of(uint32_t unit) { return __shfl_sync(0xffffffffu, uint32_t(matrix_of(unit, 16)), 0); }

  // All products of the unit before are complete when `before_is_read` is called.
  template <typename Read>
  __device__ void whole(float (&c)[C], uint32_t unit, const Read& before_is_read) {
    const uint32_t x = low_of(unit);
#pragma unroll
    for (int turn = 0; turn < kUnit / kStep / kTogether; turn++) {
      auto& now = a[turn % 2];
#pragma unroll
      for (int s = 0; s < kTogether; s++) packed(unit, turn * kTogether + s, now + s * 8);
      settle(now);
      begin_products();
#pragma unroll
      for (int s = 0; s < 2 * kTogether; s++) product_rows<T, C>(c, now + s * 4, at_16(x, turn * kTogether * 2 + s));
      end_products();
      wait_for_products<1>();
      settle(a[(turn + 1) % 2]);
      if (turn == 0) before_is_read();
    }
  }

  // 32 k alone, of packed rows or of the tail's, whose unit begins at `k`.
  template <bool TAIL>
  __device__ void part(float (&c)[C], uint32_t unit, int step, int k) {
    const uint32_t x = low_of(unit);
    if constexpr (TAIL)
      plain(unit, step, k, a[0]);
    else
      packed(unit, step, a[0]);
    settle(a[0]);
    begin_products();
#pragma unroll
    for (int s = 0; s < 2; s++) product_rows<T, C>(c, a[0] + s * 4, at_16(x, step * 2 + s));
    end_products();
    wait_for_products<0>();
    settle(c);
  }
};

// Results from sums. Of four sums of a thread [0], [1] are the first of its rows with activation rows 2t and 2t+1 of eight, [2], [3] the second.
template <typename T, bool SWIGLU>
struct ManyResults {
  const ManyProduct& given;
  const int n, end;  // the first of a thread's columns, and where there are no more

  __device__ ManyResults(const ManyProduct& given, int tile) : given(given), n(column(given, tile)), end(end_of(given, tile)) {}
  __device__ static int end_of(const ManyProduct& given, int tile) {
    return tile < given.tiles ? given.N : threadIdx.x < kTeamThreads ? given.N + given.tail_rows : 0;
  }
  __device__ static int column(const ManyProduct& given, int tile) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    if (SWIGLU) return (tile * (kTilePanels / 2) + warp / 2) * kPanelRows + warp % 2 * 8 + g;
    if (tile < given.tiles) return (tile * kTilePanels + warp) * kPanelRows + 2 * g;
    return given.N + (tile - given.tiles) * kTailRows + warp * kPanelRows + 2 * g;
  }
  __device__ size_t place(int m) const { return size_t(given.first_row + m) * given.stride + n; }
  __device__ int row(int eight, int i) const { return eight * 8 + threadIdx.x % 4 * 2 + i; }

  // What is added to the sums of two activation rows.
  __device__ void read_residual(int eight, Pack2<T> (&to)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (!SWIGLU && given.residual != nullptr && n < end && row(eight, i) < given.M)
        to[i].bits = *reinterpret_cast<const uint32_t*>(static_cast<const T*>(given.residual) + place(row(eight, i)));
    }
  }
  __device__ void write(int eight, const float4& v, const Pack2<T> (&residual)[2]) const {
    if (n >= end) return;
    const float values[2][2] = {{v.x, v.z}, {v.y, v.w}};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (row(eight, i) >= given.M) break;
      T* y = static_cast<T*>(given.y) + place(row(eight, i));
      float first = values[i][0], second = values[i][1];
      if constexpr (SWIGLU) {
        *y = from_float<T>(silu(first) * second);
      } else {
        if (given.residual != nullptr) first += to_float(residual[i].item[0]), second += to_float(residual[i].item[1]);
        Pack2<T> both;
        both.item[0] = from_float<T>(first), both.item[1] = from_float<T>(second);
        *reinterpret_cast<uint32_t*>(y) = both.bits;
      }
    }
  }
};

template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
__global__ void __launch_bounds__(kManyThreads, 1) product_many_kernel(const __grid_constant__ ManyProduct given) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Layout = ManyLayout<BITS, GENERAL, COLUMNS>;
  constexpr int kStages = Layout::kStages, kBytes = sizeof(typename Layout::Unit), C = COLUMNS / 2;
  extern __shared__ __align__(1024) uint8_t many_memory[];
  __shared__ __align__(8) uint64_t barriers[2 * kStages];
  const uint32_t ring = held((shared_of(many_memory) + 1023) / 1024 * 1024), full = held(shared_of(barriers)), empty = full + kStages * 8;
  let_next_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) barrier_init(full + i * 8, 1), barrier_init(empty + i * 8, kMultipliers / 32);
    publish_barriers();
  }
  __syncthreads();
  const ManyShare share(given);

  if (threadIdx.x >= kMultipliers) {
    const ManyCopier<BITS, GENERAL, COLUMNS, SWIGLU> copier{given};
    const int tiles = (given.all_tiles - share.tile + share.step - 1) / share.step, total = tiles * share.count, ahead = min(kStages, total);
    for (int i = 0; i < ahead; i++)
      copier.weights(share.tile + i / share.count * share.step, share.first + i % share.count, ring + i * kBytes, full + i * 8);
    wait_for_previous();
    for (int i = 0; i < ahead; i++) copier.activations(share.first + i % share.count, ring + i * kBytes, full + i * 8);
    int slot = 0, parity = 0, tile = share.tile + ahead / share.count * share.step, unit = ahead % share.count;
    for (int i = ahead; i < total; i++) {
      barrier_wait(empty + slot * 8, parity);
      copier.weights(tile, share.first + unit, ring + slot * kBytes, full + slot * 8);
      copier.activations(share.first + unit, ring + slot * kBytes, full + slot * 8);
      if (++slot == kStages) slot = 0, parity ^= 1;
      if (++unit == share.count) unit = 0, tile += share.step;
    }
    return;
  }

  const int team = threadIdx.x / kTeamThreads, lane = threadIdx.x % 32, eights = (given.M + 7) / 8, splits = given.splits;
  ManyFragments<T, BITS, GENERAL, COLUMNS, SWIGLU> fragments(given.w);
  float c[C];
  wait_for_previous();
  int slot = 0, parity = 0;
  for (int tile = share.tile; tile < given.all_tiles; tile += share.step) {
    const bool tail = tile >= given.tiles;
#pragma unroll
    for (int i = 0; i < C; i++) c[i] = 0.0f;
    int i = 0;
    const auto before_is_read = [&] {
      if (i > 0 && lane == 0) barrier_arrive(empty + (slot == 0 ? kStages - 1 : slot - 1) * 8);
    };
    const auto next = [&] {
      i++;
      if (++slot == kStages) slot = 0, parity ^= 1;
    };
    if (tail) {  // one team
      for (; i < share.count; next()) {
        barrier_wait(full + slot * 8, parity);
        before_is_read();
        if constexpr (!SWIGLU) {
          for (int step = 0; step < (team == 0 ? kUnit / kStep : 0); step++)
            fragments.template part<true>(c, ring + slot * kBytes, step, (share.first + i) * kUnit);
        }
      }
    } else {
      const int whole = min(share.count, given.w.padded() / kUnit - share.first);
      for (; i < whole; next()) {
        barrier_wait(full + slot * 8, parity);
        fragments.whole(c, ring + slot * kBytes, before_is_read);
      }
      wait_for_products<0>();
      settle(c);
      if (i < share.count) {  // the last unit ends early
        barrier_wait(full + slot * 8, parity);
        before_is_read();
#pragma unroll
        for (int step = 0; step < kUnit / kStep; step++) {
          if (step < given.w.padded() % kUnit / kStep) fragments.template part<false>(c, ring + slot * kBytes, step, 0);
        }
        next();
      }
    }
    if (lane == 0) barrier_arrive(empty + (slot == 0 ? kStages - 1 : slot - 1) * 8);

    const auto four = [&](int i) { return make_float4(c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3]); };
    const ManyResults<T, SWIGLU> results(given, tile);
    if (splits == 1) {
#pragma unroll
      for (int i = 0; i < C / 4; i++) {
        if (i >= eights) break;
        Pack2<T> residual[2];
        results.read_residual(i, residual);
        results.write(i, four(i), residual);
      }
      continue;
    }
    // There is no other tile: all that was copied has been used. Sums are left there, [C / 4][kMultipliers] of four, and the blocks of the cluster take
    // eight activation rows in turn, to add up all sums of them.
    asm volatile("bar.sync 1, %0;" ::"n"(kMultipliers) : "memory");
    const uint32_t own = ring + threadIdx.x * 16;
#pragma unroll
    for (int i = 0; i < C / 4; i++) {
      if (i < eights) store_shared(own + i * kMultipliers * 16, four(i));
    }
    cluster_sync();
    for (int i = share.rank; i < eights; i += splits) {
      Pack2<T> residual[2];
      results.read_residual(i, residual);
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
      for (int rank = 0; rank < splits; rank++) {
        const float4 v = load_remote(own + i * kMultipliers * 16, rank);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      results.write(i, sum, residual);
    }
    cluster_sync();  // nobody leaves while another reads its sums
    return;
  }
#endif
}

template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
void run_many(const ManyProduct& given, int blocks, cudaStream_t stream) {
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
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kManyThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = given.splits > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, given), "cudaLaunchKernelEx");
}

}  // namespace qwen
