// The kernels of a mixture layer of up to 8 tokens. There are three, because two results must be whole before anything can go on: the logits, which
// choose the experts, and the inner activations.
//
//   enter   the norm; router, gate and the gate and up rows of the shared expert. All weights are known, and on their way before the norm's input is.
//   inner   each block chooses the experts anew, which takes less than a launch, then fetches gate and up rows of one.
//   leave   chooses, and fetches down rows of all experts while `inner` still runs; adds up.
//
// Each kernel waits before it lets the next one start. So when `inner` starts, what is in front of `enter` is complete, and when `leave` starts,
// `enter` is: both read such results before they wait.
#pragma once

#include "choose_experts.cuh"
#include "few_tiles.cuh"
#include "mixture.cuh"

namespace qwen {

constexpr int kEnterWarps = 16, kInnerWarps = 16, kLeaveWarps = 12;
constexpr int kEnterStages = 4, kLeaveStages = 3;
template <typename Panels>
constexpr int kInnerStages = Panels::kBits == 4 ? 4 : 2;  // so that the sums of 8 rows find room beside them
constexpr int kUsualExperts = 256, kMostChosenFrom = 512;  // a lane has no registers for the logits of more

template <typename Panels>
using EnterTile = PanelsTile<Panels, kEnterWarps, kEnterStages, 2, true>;
// Columns of a block of `inner`: a single token has a block for each multiprocessor, several have blocks enough for 64 columns each, and most end before
// they need the rows.
template <bool ONE>
constexpr int kInnerColumns = ONE ? 32 : 64;
template <typename Panels, bool ONE>
using InnerTile = PanelsTile<Panels, kInnerWarps, kInnerStages<Panels>, 2 * kInnerColumns<ONE> / kPanelRows, true>;
template <typename T>
using RouterTile = RowsTile<T, kEnterWarps>;

template <typename T>
struct MixtureWork {
  Mixture<T> of;
  T* logits;     // [tokens,E]
  float* gates;  // [tokens]
  T* inner;      // [visits,I], then [tokens,S] of the shared expert
  int log_rows;  // tokens rounded up to a power of two

  __host__ __device__ T* shared_inner() const { return inner + size_t(of.routed.tokens) * of.routed.K * of.routed.I; }
  __host__ __device__ int units() const { return (of.routed.H + kUnit - 1) / kUnit; }
  template <typename Rows>
  __host__ __device__ int rows_bytes() const {
    return int(Rows::staged_bytes(units() * kUnitChunks, log_rows));
  }

  template <typename Rows>
  __device__ Rows rows(uint8_t* staged) const {
    return {of.s, reinterpret_cast<uint4*>(staged), of.routed.tokens, of.routed.H, log_rows, units() * kUnitChunks};
  }
};

// Blocks: 16 columns of the shared expert each, then 8 experts of the router each, then the gate.
template <typename Panels, typename T = typename Panels::Element>
__global__ void __launch_bounds__(kEnterWarps * 32, 2) mixture_enter_kernel(const MixtureWork<T> work) {
  extern __shared__ __align__(16) uint8_t shared[];
  const Mixture<T>& of = work.of;
  constexpr int kRows = RouterTile<T>::kRows;
  const int H = of.routed.H, E = of.routed.E, M = of.routed.tokens, tiles = of.S / kPanelRows, router = (E + kRows - 1) / kRows;
  const bool is_shared = int(blockIdx.x) < tiles, is_gate = int(blockIdx.x) == tiles + router;
  using Rows = typename Panels::Rows;
  const Rows rows = work.template rows<Rows>(shared);
  uint8_t* const behind_rows = shared + work.template rows_bytes<Rows>();
  float* const sums = reinterpret_cast<float*>(behind_rows);
  const uint4 weight = rows.first_weight(of.norm);
  const Panels panels(of.shared_gate_up);
  EnterTile<Panels> tile(panels, behind_rows + EnterTile<Panels>::sums_bytes(rows.log_rows), int(blockIdx.x) * kPanelRows, of.S,
                         (of.shared_gate_up.panels() - 1) * kPanelRows, work.units());
  const int first = (int(blockIdx.x) - tiles) * kRows;
  const RouterTile<T> routing{behind_rows + EnterTile<Panels>::sums_bytes(rows.log_rows), H};
  if (is_shared)
    tile.start();
  else
    routing.start(is_gate ? of.gate : of.router + size_t(first) * H, is_gate ? 1 : min(kRows, E - first));
  wait_for_previous();
  let_next_start();
  rows.stage(of.norm, weight, of.eps);
  if (is_shared) {
    tile.run(rows, sums);
    const int m = threadIdx.x / kPanelRows;
    if (m >= M) return;
    const float gate = tile.total(sums, rows.log_rows, 0, threadIdx.x), up = tile.total(sums, rows.log_rows, 1, threadIdx.x);
    work.shared_inner()[size_t(m) * of.S + blockIdx.x * kPanelRows + threadIdx.x % kPanelRows] = from_float<T>(silu(gate) * up);
  } else {
    routing.run(rows, sums);
    const int m = threadIdx.x / kRows, r = threadIdx.x % kRows;
    if (m >= M) return;
    const float value = routing.total(sums, rows.log_rows, threadIdx.x);
    if (is_gate) {
      if (r == 0) work.gates[m] = value;
    } else if (first + r < E) {
      work.logits[size_t(m) * E + first + r] = from_float<T>(value);
    }
  }
}

// Block (columns, visit). The first visit of an expert does the work of all of them: a token visits it once, so they are 8 at most. ONE: of a single token.
template <typename Panels, bool ONE, int EXPERTS, typename T = typename Panels::Element>
__global__ void __launch_bounds__(kInnerWarps * 32, 2) mixture_inner_kernel(const MixtureWork<T> work) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ int chosen[kFewColumns * kMostSelected];
  const Mixture<T>& of = work.of;
  const int M = of.routed.tokens, E = of.routed.E, K = of.routed.K, I = of.routed.I, own = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  using Rows = typename Panels::Rows;
  const Rows rows = work.template rows<Rows>(shared);
  uint8_t* const behind_rows = shared + work.template rows_bytes<Rows>();
  float* const sums = reinterpret_cast<float*>(behind_rows);
  const uint4 weight = rows.first_weight(of.norm);
  if constexpr (ONE) rows.stage(of.norm, weight, of.eps);
  wait_for_previous();
  let_next_start();
  if (warp < M) {
    const Choice choice = choose_experts<EXPERTS>(work.logits + size_t(warp) * E, E, K);
    if (lane < K) chosen[warp * K + lane] = choice.expert;
  }
  __syncthreads();
  const int e = chosen[own];
  for (int v = 0; v < own / K * K; v++) {
    if (chosen[v] == e) return;
  }
  const Panels panels(of.routed.gate_up.expert(e));
  using Tile = InnerTile<Panels, ONE>;
  constexpr int kColumns = kInnerColumns<ONE>;
  const int column = int(blockIdx.x) * kColumns;
  Tile tile(panels, behind_rows + Tile::sums_bytes(rows.log_rows), column, I, 2 * I - kPanelRows, work.units());
  tile.start();
  if constexpr (!ONE) rows.stage(of.norm, weight, of.eps);
  tile.run(rows, sums);
  for (int i = threadIdx.x; i < kColumns << rows.log_rows; i += kInnerWarps * 32) {
    const int p = i >> (rows.log_rows + 4), at = i & ((kPanelRows << rows.log_rows) - 1), m = at / kPanelRows, n = column + p * kPanelRows + at % kPanelRows;
    if (m >= M || n >= I) continue;
    const T value = from_float<T>(silu(tile.total(sums, rows.log_rows, p, at)) * tile.total(sums, rows.log_rows, p + kColumns / kPanelRows, at));
    for (int j = 0; j < K; j++) {
      if (chosen[m * K + j] == e) work.inner[size_t(m * K + j) * I + n] = value;
    }
  }
}

// Block (16 columns, token). A piece is a unit of the down rows of one expert, in the order of the choice, the shared one last.
template <typename Panels, int EXPERTS, typename T = typename Panels::Element>
__global__ void __maxnreg__(64) mixture_leave_kernel(const MixtureWork<T> work) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ int experts[kMostSelected];
  __shared__ float factors[kMostSelected + 1];
  const Mixture<T>& of = work.of;
  const int E = of.routed.E, K = of.routed.K, I = of.routed.I, S = of.S, H = of.routed.H, token = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * kPanelRows;
  const int units = of.routed.down.units(), routed = K * units, all = routed + of.shared_down.units();
  if (warp == 0) {
    const Choice choice = choose_experts<EXPERTS>(work.logits + size_t(token) * E, E, K);
    if (lane < K) experts[lane] = choice.expert, factors[lane] = choice.weight;
  } else if (threadIdx.x == 32) {
    factors[K] = 1.0f / (1.0f + __expf(-work.gates[token]));
  }
  __syncthreads();
  const Panels shared_panels(of.shared_down);
  const int bytes = max(Panels::unit_bytes(of.routed.down), shared_panels.bytes);
  using Rows = typename Panels::Rows;
  uint8_t* const behind_ring = shared + kLeaveWarps * kLeaveStages * bytes;
  uint4* const staged = reinterpret_cast<uint4*>(behind_ring);
  float* const sums = reinterpret_cast<float*>(behind_ring + Rows::staged_bytes(all * kUnitChunks, 0));
  WarpRing<kLeaveStages, 1> ring{shared + warp * kLeaveStages * bytes, bytes, (all - warp + kLeaveWarps - 1) / kLeaveWarps};
  // A warp has the pieces warp, warp + kLeaveWarps, ...; `expert` is K behind the routed ones.
  const auto advance = [&](int& expert, int& unit) {
    while (expert < K && unit >= units) unit -= units, expert++;
  };
  int fetched_expert = 0, fetched_unit = warp, used_expert = 0, used_unit = warp;
  const auto fetch = [&](int, uint8_t* into) {
    advance(fetched_expert, fetched_unit);
    const QuantMatrix own = fetched_expert < K ? of.routed.down.expert(experts[fetched_expert]) : of.shared_down;
    Panels(own).fetch(first, fetched_unit, into);
    fetched_unit += kLeaveWarps;
  };
  ring.start(fetch);
  const int column = first + int(threadIdx.x);
  const bool writes = threadIdx.x < kPanelRows && column < H;
  const float residual = writes ? to_float(of.s[size_t(token) * H + column]) : 0.0f;
  wait_for_previous();
  let_next_start();
  const T *own = work.inner + size_t(token) * K * I, *own_shared = work.shared_inner() + size_t(token) * S;
  const Rows rows{nullptr, staged, 1, all * kUnit, 0, all * kUnitChunks};
  for (int c = threadIdx.x; c - lane < all * kUnitChunks; c += kLeaveWarps * 32) {
    const int p = c / kUnitChunks, j = min(p / units, K), k = (p - j * units) * kUnit + c % kUnitChunks * kChunk;
    const T* row = j < K ? own + size_t(j) * I : own_shared;
    Pack8<T> value;
    value.bits = p < all && k < (j < K ? I : S) ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
    rows.put(0, c, value);
  }
  __syncthreads();
  float sum[4] = {};
#pragma unroll 1
  for (int p = warp; p < all; p += kLeaveWarps) {
    ring.next(fetch, [&](const uint8_t* from) {
      advance(used_expert, used_unit);
      float part[4] = {};
      typename Panels::Activations with;
      shared_panels.read(rows, p, with);
      shared_panels.multiply_panel(from, with, part);
      const float factor = factors[used_expert];
#pragma unroll
      for (int n = 0; n < 4; n++) sum[n] += factor * part[n];
      used_unit += kLeaveWarps;
    });
  }
  put_sums(sum, sums + warp * kPanelRows, 0);
  __syncthreads();
  if (!writes) return;
  float value = 0.0f;
#pragma unroll
  for (int i = 0; i < kLeaveWarps; i++) value += sums[i * kPanelRows + threadIdx.x];
  of.y[size_t(token) * H + column] = from_float<T>(value + residual);
}

}  // namespace qwen
