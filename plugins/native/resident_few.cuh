// Products of up to 8 rows by blocks that stay: one per multiprocessor, each with an equal share of the panels. `Panels` (quant_panels.cuh,
// plain_panels.cuh) fetches and multiplies; what is here is the same for both of them.
//
// A step is a chain of such products, each of a few microseconds. What counts is that weights are on their way at all times, and that little happens
// between the result of one product and the first sum of the next:
// * The next product may start as soon as all blocks of this one have. It takes no more than half of a multiprocessor, so its blocks find room
//   beside these, and fill their rings while these still multiply.
// * The warps of a block share a panel's k. Each has a ring of its own, which goes on over the borders of panels: only sums meet, those of two
//   panels at once.
// * Code is short: loops are not unrolled beyond a unit. A kernel of this length is over before long code has been fetched.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "few_rows.cuh"
#include "plain_panels.cuh"
#include "product_few.cuh"

namespace qwen {

constexpr int kResidentWarps = 16, kResidentThreads = kResidentWarps * 32;
constexpr int kPanelsTogether = 2;  // whose sums meet at once
constexpr int kMostStages = 5;      // as many as await_stage can tell apart
constexpr int kTailUnit = 32;       // so that a unit of a tail is no larger than one of a quantized matrix

// Where things are in shared memory, and who does what: the host decides.
struct ResidentPlan {
  int blocks;       // that multiply the matrix; one for each 16 rows of the tail follows
  int stages;       // of a ring
  int log_rows;     // M rounded up to a power of two
  int sums, rows;   // bytes before the partial sums and before the activations
  bool staged, swiglu;
};

inline __device__ void await_stage(int pending) {
  if (pending & 2) {
    if (pending & 1)
      await_copies<3>();
    else
      await_copies<2>();
  } else {
    if (pending & 1)
      await_copies<1>();
    else
      await_copies<0>();
  }
}

// A block's share: tiles `first`, first + step, ... of `tiles`. A tile is a panel, or of SwiGlu a gate and an up panel. Its columns of y begin at
// `columns`, and there are `width` of them.
struct Share {
  int first, step, tiles, columns, width;
};

template <typename Panels, typename Given, typename T = typename Panels::Element>
__device__ void multiply_share(const typename Panels::Matrix& w, const Given& given, const ResidentPlan& plan, const Share& share, uint8_t* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, M = given.M, units = w.units();
  const Panels panels(w);
  const int per_tile = plan.swiglu ? 2 : 1, count = (share.tiles - share.first + share.step - 1) / share.step * per_tile;
  const auto row_of = [&](int i) {  // the first row of this block's panel i
    const int tile = share.first + (plan.swiglu ? i >> 1 : i) * share.step;
    return tile * kPanelRows + (plan.swiglu && (i & 1) ? given.N : 0);
  };
  uint8_t *const ring = shared + warp * plan.stages * panels.bytes, *const ring_end = ring + plan.stages * panels.bytes;
  uint8_t* into = ring;
  // The units of a group of panels are dealt out like one row of units: few of them leave no warp idle.
  static_assert(kPanelsTogether == 2, "the second panel of a group begins where the first ended");
  const int second = (warp - units) & (kResidentWarps - 1);
  const auto start = [&](int i) { return i & 1 ? second : warp; };
  int fetched = 0, next_unit = start(0);
  const auto fetch_next = [&] {
    while (fetched < count && next_unit >= units) next_unit = start(++fetched);
    if (fetched < count) {
      panels.fetch(row_of(fetched), next_unit, into);
      next_unit += kResidentWarps;
    }
    end_copies();
    into = into + panels.bytes == ring_end ? ring : into + panels.bytes;
  };
#pragma unroll 1
  for (int i = 1; i < plan.stages; i++) fetch_next();

  const T* norm = static_cast<const T*>(given.norm);
  const FewRows<T> rows{static_cast<const T*>(given.x), plan.staged ? reinterpret_cast<uint4*>(shared + plan.rows) : nullptr, M, w.K, plan.log_rows,
                        units * (Panels::kUnitK / kChunk)};
  const uint4 weight = rows.first_weight(norm);
  wait_for_previous();
  // In a group of panels a thread writes one value of y: row m, column r of a tile.
  const int log_sums = plan.log_rows + 4, r = threadIdx.x % kPanelRows, m = threadIdx.x / kPanelRows & ((1 << plan.log_rows) - 1);
  const int tile = threadIdx.x >> log_sums, tiles_together = kPanelsTogether / per_tile;
  const T* residual = static_cast<const T*>(given.residual);
  T* y = static_cast<T*>(given.y);
  const auto place = [&](int first) {  // of that value, -1 where there is none
    const int column = row_of(first + tile * per_tile) + r;
    return tile < tiles_together && first + tile * per_tile < count && m < M && column < share.width
               ? m * (given.N + given.tail_rows) + share.columns + column
               : -1;
  };
  int at = place(0);
  float added = residual != nullptr && at >= 0 ? to_float(residual[at]) : 0.0f;
  rows.stage(norm, weight, given.eps);

  float* const partial = reinterpret_cast<float*>(shared + plan.sums);  // [2][kPanelsTogether][warps][rows][16]
  const int per_panel = kResidentWarps << log_sums;
  const uint8_t* from = ring;
  int half = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += kPanelsTogether) {
    float* const sums = partial + half * kPanelsTogether * per_panel;
#pragma unroll 1
    for (int p = 0; p < min(kPanelsTogether, count - first); p++) {
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
      for (int unit = start(p); unit < units; unit += kResidentWarps) {
        await_stage(plan.stages - 2);
        __syncwarp();
        fetch_next();
        panels.multiply_unit(from, unit, rows, sum);
        from = from + panels.bytes == ring_end ? ring : from + panels.bytes;
      }
      float* own = sums + p * per_panel + (warp << log_sums) + 2 * g;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (2 * t + i < 1 << plan.log_rows) *reinterpret_cast<float2*>(own + (2 * t + i) * kPanelRows) = make_float2(sum[i], sum[2 + i]);
      }
    }
    __syncthreads();
    if (at >= 0) {
      const float* all = sums + tile * per_tile * per_panel + (threadIdx.x & ((1 << log_sums) - 1));
      const auto total = [&](const float* of) {
        float value = 0.0f;
#pragma unroll
        for (int i = 0; i < kResidentWarps; i++) value += of[i << log_sums];
        return value;
      };
      const float value = total(all);
      y[at] = from_float<T>(plan.swiglu ? silu(value) * total(all + per_panel) : value + added);
    }
    at = place(first + kPanelsTogether);
    added = residual != nullptr && at >= 0 ? to_float(residual[at]) : 0.0f;
    half ^= 1;  // whoever writes these sums again has met the readers of now once more
  }
  await_copies<0>();
}

template <typename Panels>
__global__ void __launch_bounds__(kResidentThreads, 2) resident_few_kernel(const FewProduct<typename Panels::Matrix> given, const ResidentPlan plan) {
  using T = typename Panels::Element;
  extern __shared__ __align__(16) uint8_t shared[];
  let_next_start();
  if (int(blockIdx.x) < plan.blocks) {
    multiply_share<Panels>(given.w, given, plan, {int(blockIdx.x), plan.blocks, given.tiles, 0, given.N}, shared);
  } else {
    const int panel = int(blockIdx.x) - plan.blocks;
    const PlainMatrix<T, kTailUnit> tail{static_cast<const T*>(given.tail), given.tail_rows, given.w.K};
    multiply_share<PlainPanels<T, kTailUnit>>(tail, given, plan, {panel, 1 << 20, panel + 1, given.N, given.tail_rows}, shared);
  }
}

constexpr int kLongestRow = 32 << 10;  // that fits beside the rings of both formats

// For a product with N columns of y. Where shared memory is small (99 KiB on consumer devices) rings would be too short.
template <typename Panels>
bool resident_is_better(int N, int K) {
  return Panels::chosen(N, K) && K <= kLongestRow && most_shared() >= 128 << 10;
}

// Half of a multiprocessor's shared memory, so that two blocks fit; more if the activations need it.
template <typename Panels>
void resident_few(FewProduct<typename Panels::Matrix> given, bool swiglu, cudaStream_t stream) {
  using T = typename Panels::Element;
  const int M = given.M, most = most_shared(), one_kib = 1024, chunks = given.w.units() * (Panels::kUnitK / kChunk);
  ResidentPlan plan{};
  plan.log_rows = log_rows_of(M);
  plan.swiglu = swiglu;
  const int sums = int(sizeof(float) * 2 * kPanelsTogether * kResidentWarps * kPanelRows) << plan.log_rows;
  const int stage = kResidentWarps * Panels::unit_bytes(given.w);
  int rows = int(FewRows<T>::staged_bytes(chunks, plan.log_rows));
  plan.staged = 2 * stage + sums + rows <= most;
  if (!plan.staged) rows = 0;
  if (!plan.staged && (given.norm != nullptr || 2 * stage + sums > most)) {
    if (M == 1) throw std::runtime_error("a product of a few rows: a row does not fit in shared memory");
    const int width = given.N + given.tail_rows, together = (M + 1) / 2;
    for (int m = 0; m < M; m += together) {
      FewProduct<typename Panels::Matrix> part = given;
      part.M = std::min(together, M - m);
      part.x = static_cast<const T*>(given.x) + size_t(m) * given.w.K;
      part.y = static_cast<T*>(given.y) + size_t(m) * width;
      if (given.residual != nullptr) part.residual = static_cast<const T*>(given.residual) + size_t(m) * width;
      resident_few<Panels>(part, swiglu, stream);
    }
    return;
  }
  const int half = (most + 2 * one_kib) / 2 - 2 * one_kib, room = 2 * stage + sums + rows <= half ? half : most;
  plan.stages = std::min(kMostStages, (room - sums - rows) / stage);
  plan.sums = plan.stages * stage;
  plan.rows = plan.sums + sums;
  const int tails = (given.tail_rows + kPanelRows - 1) / kPanelRows;
  given.tiles = (given.N + kPanelRows - 1) / kPanelRows;
  plan.blocks = std::max(1, std::min(given.tiles, multiprocessors() - tails));
  constexpr auto kernel = resident_few_kernel<Panels>;
  static DeviceFlags allowed;
  allowed.once([&] { allow_shared(kernel, size_t(most)); });
  launch(kernel, dim3(plan.blocks + tails), dim3(kResidentThreads), size_t(plan.rows + rows), stream, given, plan);
}

}  // namespace qwen
