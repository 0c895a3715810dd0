// A chain of products for a few rows in one launch: each multiprocessor has one block, which stays for the whole chain.
//
// A step of a decoder is a chain of products of a few microseconds. Launched one by one, each begins with an empty pipeline and ends with an idle
// memory. Here a ring of weights in each block goes on over the borders of products: one warp fills it, and while the others wait for the values of
// the product before, the weights of the next ones are on their way.
// * Values go from block to block as words (chain_words.cuh). There is no barrier over all blocks.
// * A product with few columns is divided over k, too, so that all blocks have an equal share. Its columns are sums of up to kMostParts parts, which
//   all readers add up in one order.
// * The residual stream stays in the shared memory of every block.
// All blocks must run at the same time: chain_streams.h.
#pragma once

#include "chain_input.cuh"

namespace qwen {

// A block's part of a step.
struct OwnShare {
  int begin, end, first_panel, last_panel, slot;
  int first_unit, ahead;  // of its panel; in the row of a panel's units, from a warp's unit to its next one
};

__device__ inline OwnShare own_share(const Spread& spread, int block) {
  OwnShare own{};
  const int share = block - spread.first_block;
  if (share < 0 || share >= spread.blocks) return own;
  own.begin = spread.begin(share), own.end = spread.begin(share + 1);
  own.first_panel = divided(own.begin, spread.units), own.last_panel = divided(own.end + spread.units - 1, spread.units);
  own.first_unit = own.begin - own.first_panel * spread.units, own.ahead = kChainWarps - divided(kChainWarps, spread.units) * spread.units;
  own.slot = spread.whole || own.begin == own.end ? 0 : share - spread.first_share(own.first_panel);
  return own;
}
// The warp that fetches makes them and goes on, the others wait, for each other as well.
template <bool WAIT>
__device__ inline void shares_made() {
  if constexpr (WAIT)
    asm volatile("bar.sync 2, %0;" ::"n"(kChainThreads + 32) : "memory");
  else
    asm volatile("bar.arrive 2, %0;" ::"n"(kChainThreads + 32) : "memory");
}

template <typename Panels>
__device__ inline void fetch_norms(const ChainProgram<Panels>& program, const ChainStep<Panels>* steps, uint8_t* into, uint32_t barrier) {
  using T = typename Panels::Element;
  barrier_expect(barrier, program.norms * int(sizeof(T)));
  for (int s = 0; s < program.count; s++) {
    if (steps[s].norm != nullptr) copy_bulk(shared_of(reinterpret_cast<T*>(into) + steps[s].norm_at), steps[s].norm, steps[s].K * int(sizeof(T)), barrier);
  }
}

// The warp that fetches.
template <typename Panels>
__device__ inline void fetch_chain(const ChainProgram<Panels>& program, const ChainStep<Panels>* steps, const OwnShare* shares, uint32_t ring, uint32_t full,
                                   uint32_t empty) {
  const int stages = program.stages;
  int slot = 0, parity = 1, landing = 0, landing_parity = 0, ahead = 0;
#pragma unroll 1
  for (int s = 0; s < program.count; s++) {
    const ChainStep<Panels>& step = steps[s];
    const OwnShare own = shares[s];
    if (own.begin == own.end) continue;
    typename Panels::Source source;
    source.open(step);
    const int units = step.spread.units;
    int panel = own.first_panel, unit = own.begin - panel * units;
#pragma unroll 1
    for (int index = own.begin; index < own.end; index += kChainWarps) {
      barrier_wait(empty + slot * 8, parity);
      source.fetch(panel, unit, min(kChainWarps, own.end - index), ring + slot * Panels::kStage, full + slot * 8);
      unit += kChainWarps;
      while (unit >= units) unit -= units, panel++;
      if (++slot == stages) slot = 0, parity ^= 1;
      if (++ahead < kInFlight) continue;
      barrier_wait(full + landing * 8, landing_parity);
      if (++landing == stages) landing = 0, landing_parity ^= 1;
    }
  }
}

// The words of the call before become those of the next one.
template <typename Panels>
__device__ inline void clear_words(const ChainProgram<Panels>& program, int buffer) {
  for (int i = blockIdx.x * kChainThreads + threadIdx.x; i < program.buffer / 4; i += gridDim.x * kChainThreads)
    reinterpret_cast<uint4*>(program.words + buffer)[i] = make_uint4(kNotYet, kNotYet, kNotYet, kNotYet);
}

// The place in the ring of the warps that multiply.
struct ChainRing {
  const uint8_t* shared;
  uint32_t full, empty;
  int stages, slot = 0, parity = 0;

  template <int BYTES>
  __device__ const uint8_t* await() const {
    barrier_wait(full + slot * 8, parity);
    return shared + slot * BYTES;
  }
  // This warp has read its unit.
  __device__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + slot * 8);
    if (++slot == stages) slot = 0, parity ^= 1;
  }
};

// The sums of all warps for the panels of a group, from shared memory to the blocks that read them. Pairs of columns; a pair's warps are added in
// an order that does not depend on M.
template <typename Panels, int LOG_ROWS>
__device__ inline void finish_panels(const ChainStep<Panels>& step, const OwnShare& own, int M, int group, int count, const float* sums, int per_warp,
                                     int buffer) {
  using T = typename Panels::Element;
  constexpr int kRows = 1 << LOG_ROWS, kLogThreads = 9 - 3 - log_together(LOG_ROWS) - LOG_ROWS, kOwn = kChainWarps >> kLogThreads;
  static_assert(1 << 9 == kChainThreads && kOwn >= 2 && kOwn <= 8);
  const int part = threadIdx.x & ((1 << kLogThreads) - 1), pair = threadIdx.x >> kLogThreads;
  const int m = pair >> 3 & (kRows - 1), p = pair >> (3 + LOG_ROWS);
  const bool swiglu = step.up_rows != 0;
  const auto total = [&](int panel) {
    const float* at = sums + part * kOwn * per_warp + (panel * kRows + m) * kPanelRows + (pair & 7) * 2;
    const auto one = [&](int i) { return *reinterpret_cast<const float2*>(at + i * per_warp); };
    const auto add = [](float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); };
    float2 value = add(one(0), one(1));
    if constexpr (kOwn >= 4) value = add(value, add(one(2), one(3)));
    if constexpr (kOwn >= 8) value = add(value, add(add(one(4), one(5)), add(one(6), one(7))));
#pragma unroll
    for (int step = 1; step < 1 << kLogThreads; step *= 2) {
      value.x += __shfl_xor_sync(0xffffffffu, value.x, step), value.y += __shfl_xor_sync(0xffffffffu, value.y, step);
    }
    return value;
  };
  if (p >= count || (swiglu && p % 2)) return;  // the same for all threads of a warp
  float2 value = total(p);
  if (swiglu) {
    const float2 up = total(p + 1);
    value = make_float2(__fdividef(value.x, 1.0f + __expf(-value.x)) * up.x, __fdividef(value.y, 1.0f + __expf(-value.y)) * up.y);
  }
  if (part != 0 || m >= M) return;
  const int panel = group + p, column = step.first_column + (swiglu ? panel / 2 : panel) * kPanelRows + (pair & 7) * 2;
  const int64_t at = int64_t(m) * step.columns + column;
  const uint32_t both = pair_of(from_float<T>(value.x), from_float<T>(value.y));
  const int slot = step.spread.whole || panel != own.first_panel ? 0 : own.slot;  // all later panels begin in this share
  if (step.out != nullptr) store_word(step.out + buffer + (int64_t(slot) * M * step.columns + at) / 2, both);
  if (step.y != nullptr) *reinterpret_cast<uint32_t*>(step.y + at) = both;
}

// Where a warp begins in its block's share, made before the step's values have come.
struct ShareStart {
  OwnShare own;
  int index, unit, units;

  __device__ ShareStart(const OwnShare& own, int units) : own(own), units(units) {
    const int warp = threadIdx.x / 32;
    index = own.begin + warp, unit = own.first_unit + warp;
    while (units > 0 && unit >= units) unit -= units;  // a step without columns has none
  }
};

// Unit: what a warp has of a stage.
template <typename Panels, int LOG_ROWS, typename Unit>
__device__ inline void multiply_step(const ChainStep<Panels>& step, const ShareStart& start, const ChainRows<typename Panels::Element>& rows, ChainRing& ring,
                                     float* sums, int buffer) {
  constexpr int kRows = 1 << LOG_ROWS, kTogether = 1 << log_together(LOG_ROWS);
  constexpr int kPerWarp = kTogether * kPanelRows * kRows + 4;  // floats; four more, so that warps begin in different banks
  const OwnShare& own = start.own;
  const int warp = threadIdx.x / 32, units = start.units, end = own.end;
  uint4 x[Panels::kChunks];
#pragma unroll
  for (auto& chunk : x) chunk = make_uint4(0, 0, 0, 0);
  const int ahead = own.ahead;
  int index = start.index, unit = start.unit;
  const int place = int(held(warp * kPerWarp + Panels::template place_of_sums<LOG_ROWS>()));  // not computed again for each panel
#pragma unroll 1
  for (int group = own.first_panel; group < own.last_panel; group += kTogether) {
    const int count = min(kTogether, own.last_panel - group);
    int panel_end = group * units;
    float* to = sums + place;
#pragma unroll 1
    for (int p = 0; p < count; p++) {
      panel_end = min(end, panel_end + units);
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
      while (index < panel_end) {
        Unit now;
        now.load_input(unit, rows.staged, rows.zeros, x);
        now.load(ring.await<Panels::kStage>());
        ring.release();
        now.multiply(x, sum);
        index += kChainWarps, unit += ahead;
        if (unit >= units) unit -= units;
      }
      Panels::template keep<LOG_ROWS>(to, sum);
      to += kPanelRows * kRows;
    }
    if (group + kTogether >= own.last_panel && index - warp < end) ring.release();  // the last stage has no unit for this warp
    meet();
    finish_panels<Panels, LOG_ROWS>(step, own, rows.M, group, count, sums, kPerWarp, buffer);
    if (group + kTogether < own.last_panel) meet();  // else the next step's input does
  }
}

template <typename Panels, int LOG_ROWS>
__global__ void __launch_bounds__(kChainThreads + 32, 1) chain_kernel(const __grid_constant__ ChainProgram<Panels> program) {
#if __CUDA_ARCH__ >= 900
  using T = typename Panels::Element;
  using Step = ChainStep<Panels>;
  extern __shared__ __align__(16) uint8_t shared[];
  static_assert(sizeof(Step) % 8 == 0);
  __shared__ __align__(16) uint8_t step_bytes[sizeof(Step) * kMostChainSteps];
  __shared__ OwnShare shares[kMostChainSteps];
  const Step* const steps = reinterpret_cast<const Step*>(step_bytes);
  const int warp = threadIdx.x / 32, block = blockIdx.x, count = program.count;
  // The constant cache is slow where the index is not constant.
  for (int i = threadIdx.x; i < int(sizeof(Step)) / 8 * count; i += blockDim.x) {
    uint2 v;
    asm volatile("ld.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "l"(reinterpret_cast<const uint2*>(program.steps) + i));
    reinterpret_cast<uint2*>(step_bytes)[i] = v;
  }
  const uint32_t full = shared_of(shared + program.bars_at), empty = full + kMostChainStages * 8, norm_barrier = empty + kMostChainStages * 8;
  if (int(threadIdx.x) < program.stages) barrier_init(full + threadIdx.x * 8, 1), barrier_init(empty + threadIdx.x * 8, kChainWarps);
  if (threadIdx.x == 0) barrier_init(norm_barrier, 1);
  publish_barriers();
  __syncthreads();
  if (warp == kChainWarps) {
    // Weights of norms first: they would wait behind all the weights that will be on their way.
    if (threadIdx.x % 32 == 0) fetch_norms(program, steps, shared + program.norms_at, norm_barrier);
    if (const int s = threadIdx.x % 32; s < count) shares[s] = own_share(steps[s].spread, block);
    __syncwarp();
    shares_made<false>();
    return fetch_chain(program, steps, shares, shared_of(shared), full, empty);
  }
  const uint32_t call = program.calls[block] + 1;
  const int buffer = call % 2 * program.buffer;  // where the words of this call are
  wait_for_previous();  // neither weights depend on it nor words and their counters, which earlier calls of this chain have left
  let_next_start();
  const ChainRows<T> rows{shared + program.rows_at, reinterpret_cast<float*>(shared + program.zeros_at), reinterpret_cast<T*>(shared + program.residual_at),
                          reinterpret_cast<float*>(shared + program.squares_at), reinterpret_cast<T*>(shared + program.norms_at), norm_barrier,
                          program.M};
  ChainRing ring{shared, full, empty, program.stages};
#pragma unroll 1
  for (int s = 0; s < count; s++) {
    const Step& step = steps[s];
    if (s == 1) {  // while other blocks finish the first step
      clear_words(program, program.buffer - buffer);
      if (threadIdx.x == 0) program.calls[block] = call;
    }
    if (s == 0) shares_made<true>();
    const ShareStart start(shares[s], step.spread.units);
    if (step.tail == nullptr) stage_input<Panels, LOG_ROWS>(step, rows, buffer);
    if (start.own.begin == start.own.end) continue;
    float* const sums = reinterpret_cast<float*>(shared + program.sums_at);
    if (step.tail == nullptr)
      multiply_step<Panels, LOG_ROWS, typename Panels::template Unit<LOG_ROWS>>(step, start, rows, ring, sums, buffer);
    else
      multiply_step<Panels, LOG_ROWS, typename Panels::template Tail<LOG_ROWS>>(step, start, rows, ring, sums, buffer);
  }
#endif
}

}  // namespace qwen
