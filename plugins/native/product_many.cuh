// Products of many rows with packed matrices, on the tensor cores of compute capability 9.0. No copy of the weights is made in memory: four warps
// make fragments of 64 weight rows in registers and multiply them with the activations of up to 256 rows, which are in shared memory.
//
// A multiprocessor has one block: two or three teams of four warps, and warps that copy what they use, units of 128 k of a tile. Where there are more tiles
// than processors blocks take tiles in turn, and copies go on over their borders. Where there are fewer, several blocks (`splits`) take a part of K each,
// as a cluster, and each adds up the sums of all for some activation rows, in the order of k. A row has the same bits in tiles of every width; `splits`
// decides on them.
//
// Neither this kernel nor the one that arranges waits before it lets the next one start (device.cuh). The weights of the next product are therefore
// on their way as soon as a processor has no block of this one.
#pragma once

#include "many_units.cuh"

namespace qwen {

// And of a tail, whose rows are plain.
template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
struct ManyFragments : PackedFragments<T, ManyUnit<BITS, GENERAL, COLUMNS>, SWIGLU, 2> {
  using Unit = ManyUnit<BITS, GENERAL, COLUMNS>;
  using Base = PackedFragments<T, Unit, SWIGLU, 2>;
  const int K;
  __device__ explicit ManyFragments(const QuantMatrix& w) : Base(w), K(w.K) {}

  // 32 k of a unit that begins at `k`. Behind K there is nothing.
  template <int W>
  __device__ void plain_part(float (&c)[W], uint32_t unit, int step, int k) {
    const int row = threadIdx.x % kTeamThreads / 32 * kPanelRows + threadIdx.x % 32 / 4 * 2, first = step * kStep + threadIdx.x % 4 * 8;
    uint4 x{}, y{};
    if (row < ManyTeams<COLUMNS>::kTailRows && k + first < K) {
      const auto* at = reinterpret_cast<const uint8_t*>(__cvta_shared_to_generic(unit + sizeof(Unit::x))) + row * kTailPitch + first * 2;
      x = *reinterpret_cast<const uint4*>(at), y = *reinterpret_cast<const uint4*>(at + kTailPitch);
    }
    x = pairs_of<BITS>(x), y = pairs_of<BITS>(y);
    uint32_t* const to = this->a[0];
    to[0] = x.x, to[1] = y.x, to[2] = x.y, to[3] = y.y, to[4] = x.z, to[5] = y.z, to[6] = x.w, to[7] = y.w;
    this->alone(c, unit, step);
  }
};

// Results from sums. Of four sums of a thread [0], [1] are the first of its rows with activation rows 2t and 2t+1 of eight, [2], [3] the second.
template <typename T, int COLUMNS, bool SWIGLU>
struct ManyResults {
  static constexpr int kTilePanels = ManyTeams<COLUMNS>::kTilePanels, kTailRows = ManyTeams<COLUMNS>::kTailRows;
  const ManyProduct& given;
  const ManyItem<COLUMNS>& item;
  const int n, end;  // the first of a thread's columns, and where there are no more

  __device__ ManyResults(const ManyProduct& given, const ManyItem<COLUMNS>& item)
      : given(given), item(item), n(column(given, item.tile)), end(end_of(given, item.tile)) {}
  __device__ static int end_of(const ManyProduct& given, int tile) {
    return tile < given.tiles ? given.N : threadIdx.x < kTailRows * 2 ? given.N + given.tail_rows : 0;
  }
  __device__ static int column(const ManyProduct& given, int tile) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    if (SWIGLU) return (tile * (kTilePanels / 2) + warp / 2) * kPanelRows + warp % 2 * 8 + g;
    if (tile < given.tiles) return (tile * kTilePanels + warp) * kPanelRows + 2 * g;
    return given.N + (tile - given.tiles) * kTailRows + warp * kPanelRows + 2 * g;
  }
  __device__ size_t place(int m) const { return size_t(item.first_row + m) * given.stride + n; }
  __device__ int row(int eight, int i) const { return eight * 8 + threadIdx.x % 4 * 2 + i; }

  // What is added to the sums of two activation rows.
  __device__ void read_residual(int eight, Pack2<T> (&to)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (!SWIGLU && given.residual != nullptr && n < end && row(eight, i) < item.rows)
        to[i].bits = *reinterpret_cast<const uint32_t*>(static_cast<const T*>(given.residual) + place(row(eight, i)));
    }
  }
  // By all lanes of a warp.
  __device__ void write(int eight, const float4& v, const Pack2<T> (&residual)[2]) const {
    if (n >= end) return;
    Pack2<T> both;
    if constexpr (SWIGLU) {  // two lanes have neighboring columns: each stores both of one row
      const bool odd = threadIdx.x & 4;
      const float first = silu(v.x) * v.z, second = silu(v.y) * v.w, other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 4);
      both.item[0] = from_float<T>(odd ? other : first), both.item[1] = from_float<T>(odd ? second : other);
      if (row(eight, odd) < item.rows) *reinterpret_cast<uint32_t*>(static_cast<T*>(given.y) + place(row(eight, odd)) - odd) = both.bits;
    } else {
      const float values[2][2] = {{v.x, v.z}, {v.y, v.w}};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (row(eight, i) >= item.rows) break;
        float first = values[i][0], second = values[i][1];
        if (given.residual != nullptr) first += to_float(residual[i].item[0]), second += to_float(residual[i].item[1]);
        both.item[0] = from_float<T>(first), both.item[1] = from_float<T>(second);
        *reinterpret_cast<uint32_t*>(static_cast<T*>(given.y) + place(row(eight, i))) = both.bits;
      }
    }
  }
};

template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
__global__ void __launch_bounds__(ManyTeams<COLUMNS>::kThreads, 1) product_many_kernel(const __grid_constant__ ManyProduct given) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Layout = ManyLayout<BITS, GENERAL, COLUMNS>;
  using Teams = ManyTeams<COLUMNS>;
  using Item = ManyItem<COLUMNS>;
  constexpr int kMultipliers = Teams::kMultipliers, kStages = Layout::kStages, kBytes = sizeof(typename Layout::Unit), C = COLUMNS / 2;
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
    if constexpr (Teams::kHanded) give_registers<Teams::kLeft>();
    const ManyCopier<BITS, GENERAL, COLUMNS, SWIGLU> copier{given};
    const int total = (given.items - share.item + share.step - 1) / share.step * share.count, ahead = min(kStages, total);
    const auto item_at = [&](int i) { return Item(given, share.item + i / share.count * share.step); };
    for (int i = 0; i < ahead; i++) copier.weights(item_at(i), share.first + i % share.count, ring + i * kBytes, full + i * 8);
    wait_for_previous();
    for (int i = 0; i < ahead; i++) copier.activations(item_at(i), share.first + i % share.count, ring + i * kBytes, full + i * 8);
    int slot = 0, parity = 0, unit = ahead % share.count, number = share.item + ahead / share.count * share.step;
    Item item(given, number);
    for (int i = ahead; i < total; i++) {
      barrier_wait(empty + slot * 8, parity);
      copier.weights(item, share.first + unit, ring + slot * kBytes, full + slot * 8);
      copier.activations(item, share.first + unit, ring + slot * kBytes, full + slot * 8);
      if (++slot == kStages) slot = 0, parity ^= 1;
      if (++unit == share.count) unit = 0, number += share.step, item = Item(given, number);
    }
    return;
  }

  if constexpr (Teams::kHanded) take_registers<Teams::kTaken>();
  const int team = threadIdx.x / kTeamThreads, lane = threadIdx.x % 32, splits = given.splits;
  ManyFragments<T, BITS, GENERAL, COLUMNS, SWIGLU> fragments(given.w);
  wait_for_previous();
  int slot = 0, parity = 0;
  for (int number = share.item; number < given.items; number += share.step) {
    const Item item(given, number);
    float c[C];
    // Sums of rows that are not there are not made, where that saves enough.
    const auto multiply = [&](auto& used) {
      constexpr int W = sizeof(used) / sizeof(float);
#pragma unroll
      for (int i = 0; i < W; i++) used[i] = 0.0f;
      int i = 0;
      const auto before_is_read = [&] {
        if (i > 0 && lane == 0) barrier_arrive(empty + (slot == 0 ? kStages - 1 : slot - 1) * 8);
      };
      const auto next = [&] {
        i++;
        if (++slot == kStages) slot = 0, parity ^= 1;
      };
      if (item.tile >= given.tiles) {  // the tail: one team
        for (; i < share.count; next()) {
          barrier_wait(full + slot * 8, parity);
          before_is_read();
          if constexpr (!SWIGLU) {
            for (int step = 0; step < (team == 0 ? kUnit / kStep : 0); step++)
              fragments.plain_part(used, ring + slot * kBytes, step, (share.first + i) * kUnit);
          }
        }
      } else {
        const int whole = min(share.count, given.w.padded() / kUnit - share.first);
        for (; i < whole; next()) {
          barrier_wait(full + slot * 8, parity);
          fragments.whole(used, ring + slot * kBytes, before_is_read);
        }
        wait_for_products<0>();
        settle(used);
        if (i < share.count) {  // the last unit ends early
          barrier_wait(full + slot * 8, parity);
          before_is_read();
#pragma unroll
          for (int step = 0; step < kUnit / kStep; step++) {
            if (step < given.w.padded() % kUnit / kStep) fragments.part(used, ring + slot * kBytes, step);
          }
          next();
        }
      }
      if (lane == 0) barrier_arrive(empty + (slot == 0 ? kStages - 1 : slot - 1) * 8);
    };
    if constexpr (C > 64) {
      if (item.rows <= 64)
        multiply(reinterpret_cast<float(&)[32]>(c));
      else
        multiply(c);
    } else {
      multiply(c);
    }

    const int eights = (item.rows + 7) / 8;
    const auto four = [&](int i) { return make_float4(c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3]); };
    const ManyResults<T, COLUMNS, SWIGLU> results(given, item);
    if (splits == 1) {
      constexpr int kAhead = 8;  // whose residuals are read before any is used
#pragma unroll
      for (int first = 0; first < C / 4; first += kAhead) {
        if (first >= eights) break;
        Pack2<T> residual[kAhead][2];
#pragma unroll
        for (int i = 0; i < kAhead; i++) results.read_residual(first + i, residual[i]);
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
          if (first + i < C / 4) results.write(first + i, four(first + i), residual[i]);
        }
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

// A launch of the kernel by clusters of `splits` blocks.
template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
struct ManyLaunch {
  static constexpr auto kernel = product_many_kernel<T, BITS, GENERAL, COLUMNS, SWIGLU>;
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};

  ManyLaunch(int blocks, int splits, cudaStream_t stream) {
    constexpr size_t shared = ManyLayout<BITS, GENERAL, COLUMNS>::kShared;
    static DeviceFlags allowed;
    allowed.once([] { allow_shared(kernel, shared); });
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = splits, attributes[1].val.clusterDim.y = 1, attributes[1].val.clusterDim.z = 1;
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(ManyTeams<COLUMNS>::kThreads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = splits > 1 ? 2 : 1;
  }
};

// How many clusters run at the same time.
template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
int many_clusters(int splits) {
  const ManyLaunch<T, BITS, GENERAL, COLUMNS, SWIGLU> launch(splits, splits, nullptr);
  int count = 0;
  check(cudaOccupancyMaxActiveClusters(&count, launch.kernel, &launch.config), "cudaOccupancyMaxActiveClusters");
  return count;
}

template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
void run_many(const ManyProduct& given, int blocks, cudaStream_t stream) {
  const ManyLaunch<T, BITS, GENERAL, COLUMNS, SWIGLU> launch(blocks, given.splits, stream);
  check(cudaLaunchKernelEx(&launch.config, launch.kernel, given), "cudaLaunchKernelEx");
}

}  // namespace qwen
