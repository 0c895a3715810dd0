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
#include "mixture.cuh"
#include "quant_panels.cuh"
#include "warp_ring.cuh"

namespace qwen {

constexpr int kEnterWarps = 16, kInnerWarps = 8, kLeaveWarps = 9;
constexpr int kEnterStages = 2, kInnerStages = 2, kLeaveStages = 4;
constexpr int kMostChosenFrom = 512;  // experts: a lane has no registers for the logits of more
constexpr int kRouterRows = 8;   // of a block
constexpr int kRouterLoads = 4;  // of a lane, on their way at a time

template <typename T>
struct MixtureWork {
  Mixture<T> of;
  T* logits;     // [tokens,E]
  float* gates;  // [tokens]
  T* inner;      // [visits,I], then [tokens,S] of the shared expert
  int log_rows;  // tokens rounded up to a power of two

  __host__ __device__ T* shared_inner() const { return inner + size_t(of.routed.tokens) * of.routed.K * of.routed.I; }
  __host__ __device__ int units() const { return (of.routed.H + kUnit - 1) / kUnit; }
  __host__ __device__ int rows_bytes() const { return (int(FewRows<T>::staged_bytes(units() * kUnitChunks, log_rows)) + 15) / 16 * 16; }
  __host__ __device__ static int sums_bytes(int warps, int log_rows) { return int(sizeof(float)) * 2 * warps * kPanelRows << log_rows; }

  __device__ FewRows<T> rows(uint8_t* staged) const {
    return {of.s, reinterpret_cast<uint4*>(staged), of.routed.tokens, of.routed.H, log_rows, units() * kUnitChunks};
  }
};

// A warp's sums of a panel for [rows][16]: sum[0], [1] are row 2g of the panel with tokens 2t, 2t+1; sum[2], [3] row 2g+1.
__device__ inline void put_sums(const float (&sum)[4], float* into, int log_rows, int g, int t) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (2 * t + i < 1 << log_rows) *reinterpret_cast<float2*>(into + (2 * t + i) * kPanelRows + 2 * g) = make_float2(sum[i], sum[2 + i]);
  }
}

// Gate rows and up rows of one panel each, [width,H] of either, times the staged rows. The value of token m, row r of the panel is of thread
// m * 16 + r.
template <typename Panels, int WARPS, int STAGES>
struct GatedTile {
  const Panels& panels;
  const WarpRing<STAGES> ring;
  const int first, width;  // the gate panel's first row; that of the up panel is `width` rows behind it
  const int warp = threadIdx.x / 32;

  __device__ GatedTile(const Panels& panels, uint8_t* memory, int first, int width, int units)
      : panels(panels),
        ring{memory + threadIdx.x / 32 * STAGES * 2 * panels.bytes, 2 * panels.bytes, (units - int(threadIdx.x / 32) + WARPS - 1) / WARPS},
        first(first),
        width(width) {}

  __device__ void fetch(int i, uint8_t* into) const {
    panels.fetch(first, warp + i * WARPS, into);
    panels.fetch(first + width, warp + i * WARPS, into + panels.bytes);
  }

  __device__ void start() const {
    ring.start([&](int i, uint8_t* into) { fetch(i, into); });
  }

  template <typename T>
  __device__ float run(const FewRows<T>& rows, float* sums) const {
    float gate[4] = {}, up[4] = {};
    ring.run([&](int i, uint8_t* into) { fetch(i, into); },
             [&](int i, const uint8_t* from) {
               panels.multiply_unit(from, warp + i * WARPS, rows, gate);
               panels.multiply_unit(from + panels.bytes, warp + i * WARPS, rows, up);
             });
    const int log_sums = rows.log_rows + 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    put_sums(gate, sums + (warp << log_sums), rows.log_rows, g, t);
    put_sums(up, sums + ((WARPS + warp) << log_sums), rows.log_rows, g, t);
    __syncthreads();
    if (threadIdx.x >> log_sums) return 0.0f;
    float value = 0.0f, other = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) value += sums[(i << log_sums) + threadIdx.x], other += sums[((WARPS + i) << log_sums) + threadIdx.x];
    return silu(value) * other;
  }
};

// Up to 8 rows of an ordinary matrix [count,H] times the staged rows. The value of token m, row r is of thread m * 8 + r.
template <typename T, int WARPS>
struct RouterTile {
  const T* const row;  // of this lane, null where there is none
  const int H, warp = threadIdx.x / 32, t = threadIdx.x % 4;
  uint4 now[kRouterLoads];

  __device__ RouterTile(const T* rows, int count, int H)
      : row(int(threadIdx.x % 32 / 4) < count ? rows + size_t(threadIdx.x % 32 / 4) * H : nullptr), H(H) {
    load(0);
  }

  __device__ int step(int group, int i) const { return (group * kRouterLoads + i) * WARPS + warp; }

  __device__ void load(int group) {
#pragma unroll
    for (int i = 0; i < kRouterLoads; i++) {
      const int k = step(group, i) * kStep + t * kChunk;
      now[i] = row != nullptr && k < H ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
    }
  }

  __device__ float run(const FewRows<T>& rows, float* sums) {
    float sum[4] = {};
    const int g = threadIdx.x % 32 / 4;
    for (int group = 0; step(group, 0) * kStep < H; group++) {
      if (group > 0) load(group);
#pragma unroll
      for (int i = 0; i < kRouterLoads; i++) {
        if (step(group, i) * kStep >= H) break;
        uint4 x[1];
        rows.read(g, step(group, i) * (kStep / kChunk) + t, 1, x);
        multiply<T>(sum, now[i].x, 0, now[i].y, 0, x[0].x, x[0].y);
        multiply<T>(sum, now[i].z, 0, now[i].w, 0, x[0].z, x[0].w);
      }
    }
    const int log_sums = rows.log_rows + 3;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (2 * t + i < 1 << rows.log_rows) sums[(warp << log_sums) + (2 * t + i) * kRouterRows + g] = sum[i];
    }
    __syncthreads();
    if (threadIdx.x >> log_sums) return 0.0f;
    float value = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) value += sums[(i << log_sums) + threadIdx.x];
    return value;
  }
};

// Blocks: 16 columns of the shared expert each, then 8 experts of the router each, then the gate.
template <typename Panels, typename T = typename Panels::Element>
__global__ void __launch_bounds__(kEnterWarps * 32, 2) mixture_enter_kernel(const MixtureWork<T> work) {
  extern __shared__ __align__(16) uint8_t shared[];
  const Mixture<T>& of = work.of;
  const int H = of.routed.H, E = of.routed.E, M = of.routed.tokens, tiles = of.S / kPanelRows, router = (E + kRouterRows - 1) / kRouterRows;
  const FewRows<T> rows = work.rows(shared);
  float* const sums = reinterpret_cast<float*>(shared + work.rows_bytes());
  const uint4 weight = rows.first_weight(of.norm);
  if (int(blockIdx.x) < tiles) {
    const Panels panels(of.shared_gate_up);
    const GatedTile<Panels, kEnterWarps, kEnterStages> tile(panels, shared + work.rows_bytes() + work.sums_bytes(kEnterWarps, work.log_rows),
                                                            int(blockIdx.x) * kPanelRows, of.S, work.units());
    tile.start();
    wait_for_previous();
    let_next_start();
    rows.stage(of.norm, weight, of.eps);
    const float value = tile.run(rows, sums);
    const int m = threadIdx.x / kPanelRows;
    if (m < M) work.shared_inner()[size_t(m) * of.S + blockIdx.x * kPanelRows + threadIdx.x % kPanelRows] = from_float<T>(value);
  } else {
    const int index = int(blockIdx.x) - tiles, first = index * kRouterRows;
    const bool is_gate = index == router;
    RouterTile<T, kEnterWarps> tile(is_gate ? of.gate : of.router + size_t(first) * H, is_gate ? 1 : min(kRouterRows, E - first), H);
    wait_for_previous();
    let_next_start();
    rows.stage(of.norm, weight, of.eps);
    const float value = tile.run(rows, sums);
    const int m = threadIdx.x / kRouterRows, r = threadIdx.x % kRouterRows;
    if (m >= M) return;
    if (is_gate) {
      if (r == 0) work.gates[m] = value;
    } else if (first + r < E) {
      work.logits[size_t(m) * E + first + r] = from_float<T>(value);
    }
  }
}

// Block (16 columns, visit). The first visit of an expert does the work of all of them: a token visits it once, so they are 8 at most.
template <typename Panels, typename T = typename Panels::Element>
__global__ void __launch_bounds__(kInnerWarps * 32, 4) mixture_inner_kernel(const MixtureWork<T> work) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ int chosen[kFewColumns * kMostSelected];
  const Mixture<T>& of = work.of;
  const int M = of.routed.tokens, E = of.routed.E, K = of.routed.K, I = of.routed.I, own = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const FewRows<T> rows = work.rows(shared);
  const uint4 weight = rows.first_weight(of.norm);
  if (M == 1) rows.stage(of.norm, weight, of.eps);  // of several tokens most blocks end before they need the rows
  wait_for_previous();
  let_next_start();
  if (warp < M) {
    const Choice choice = choose_experts<kMostChosenFrom>(work.logits + size_t(warp) * E, E, K);
    if (lane < K) chosen[warp * K + lane] = choice.expert;
  }
  __syncthreads();
  const int e = chosen[own];
  for (int v = 0; v < own / K * K; v++) {
    if (chosen[v] == e) return;
  }
  const Panels panels(of.routed.gate_up.expert(e));
  float* const sums = reinterpret_cast<float*>(shared + work.rows_bytes());
  const GatedTile<Panels, kInnerWarps, kInnerStages> tile(panels, shared + work.rows_bytes() + work.sums_bytes(kInnerWarps, work.log_rows),
                                                          int(blockIdx.x) * kPanelRows, I, work.units());
  tile.start();
  if (M > 1) rows.stage(of.norm, weight, of.eps);
  const float value = tile.run(rows, sums);
  const int m = threadIdx.x / kPanelRows;
  if (m >= M) return;
  for (int j = 0; j < K; j++) {
    if (chosen[m * K + j] == e) work.inner[size_t(m * K + j) * I + blockIdx.x * kPanelRows + threadIdx.x % kPanelRows] = from_float<T>(value);
  }
}

// Block (16 columns, token). A piece is a unit of the down rows of one expert, in the order of the choice, the shared one last.
template <typename Panels, typename T = typename Panels::Element>
__global__ void __launch_bounds__(kLeaveWarps * 32, 3) mixture_leave_kernel(const MixtureWork<T> work) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ int experts[kMostSelected];
  __shared__ float factors[kMostSelected + 1];
  const Mixture<T>& of = work.of;
  const int E = of.routed.E, K = of.routed.K, I = of.routed.I, S = of.S, H = of.routed.H, token = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * kPanelRows;
  const int units = of.routed.down.units(), routed = K * units, all = routed + of.shared_down.units();
  if (warp == 0) {
    const Choice choice = choose_experts<kMostChosenFrom>(work.logits + size_t(token) * E, E, K);
    if (lane < K) experts[lane] = choice.expert, factors[lane] = choice.weight;
  } else if (threadIdx.x == 32) {
    factors[K] = 1.0f / (1.0f + __expf(-work.gates[token]));
  }
  __syncthreads();
  const Panels shared_panels(of.shared_down);
  const int bytes = max(Panels::unit_bytes(of.routed.down), shared_panels.bytes);
  uint4* const staged = reinterpret_cast<uint4*>(shared + kLeaveWarps * kLeaveStages * bytes);
  float* const sums = reinterpret_cast<float*>(staged + all * kUnitChunks);
  const WarpRing<kLeaveStages> ring{shared + warp * kLeaveStages * bytes, bytes, (all - warp + kLeaveWarps - 1) / kLeaveWarps};
  const auto piece = [&](int i) { return warp + i * kLeaveWarps; };
  const auto fetch = [&](int i, uint8_t* into) {
    const int p = piece(i), j = p / units;
    if (p < routed)
      Panels(of.routed.down.expert(experts[j])).fetch(first, p - j * units, into);
    else
      shared_panels.fetch(first, p - routed, into);
  };
  ring.start(fetch);
  const int column = first + int(threadIdx.x);
  const bool writes = threadIdx.x < kPanelRows && column < H;
  const float residual = writes ? to_float(of.s[size_t(token) * H + column]) : 0.0f;
  wait_for_previous();
  let_next_start();
  const T *own = work.inner + size_t(token) * K * I, *own_shared = work.shared_inner() + size_t(token) * S;
  for (int c = threadIdx.x; c < all * kUnitChunks; c += kLeaveWarps * 32) {
    const int p = c / kUnitChunks, j = min(p / units, K), k = (p - j * units) * kUnit + c % kUnitChunks * kChunk;
    const T* row = j < K ? own + size_t(j) * I : own_shared;
    staged[c] = k < (j < K ? I : S) ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  const FewRows<T> rows{nullptr, staged, 1, all * kUnit, 0, all * kUnitChunks};
  float sum[4] = {};
  ring.run(fetch, [&](int i, const uint8_t* from) {
    const int p = piece(i);
    float part[4] = {};
    shared_panels.multiply_unit(from, p, rows, part);
    const float factor = factors[min(p / units, K)];
#pragma unroll
    for (int n = 0; n < 4; n++) sum[n] += factor * part[n];
  });
  put_sums(sum, sums + warp * kPanelRows, 0, lane / 4, lane % 4);
  __syncthreads();
  if (!writes) return;
  float value = 0.0f;
#pragma unroll
  for (int i = 0; i < kLeaveWarps; i++) value += sums[i * kPanelRows + threadIdx.x];
  of.y[size_t(token) * H + column] = from_float<T>(value + residual);
}

}  // namespace qwen
