// The input of a step of a chain, as every block gets it: awaited, added to the residual, normalized, in shared memory.
#pragma once

#include "chain_panels.cuh"

namespace qwen {

template <typename T>
struct ChainRows {
  uint8_t* staged;    // chunks of 8 activations (chunk_at)
  float* zeros;       // of the panels' format
  T* residual;        // [M,K], kept from step to step
  float* squares;     // of 256 columns, [M,groups]
  const T* norms;     // the weights of all norms
  uint32_t norm_barrier;
  int M;
};

__device__ inline void meet() { asm volatile("bar.sync 1, %0;" ::"n"(kChainThreads) : "memory"); }  // the warps that multiply

constexpr int kLaneColumns = 8, kGroupColumns = 32 * kLaneColumns;  // a warp takes a group of columns of a row at a time
constexpr int kMostNormColumns = 32 * kGroupColumns;  // a warp adds up the squares of a row's groups

// Groups of columns of all rows, in a row: warps take them in turns.
template <int LOG_ROWS>
struct InputGroups {
  const int K, groups, all, first;  // first: of this warp

  __device__ InputGroups(int M, int K)
      : K(K), groups((K + kGroupColumns - 1) / kGroupColumns), all(M * groups), first(threadIdx.x / 32) {}

  __device__ int row(int index) const {
    int m = 0;
#pragma unroll
    for (int i = 1; i < 1 << LOG_ROWS; i++) m += index >= i * groups;
    return m;
  }
  __device__ int column(int index, int m) const { return (index - m * groups) * kGroupColumns + threadIdx.x % 32 * kLaneColumns; }
};

// Words of N groups of columns, all on their way at once.
template <typename Panels, int LOG_ROWS, int N, typename T = typename Panels::Element>
__device__ inline void copy_groups(const ChainStep<Panels>& step, const ChainRows<T>& rows, const InputGroups<LOG_ROWS>& input, int buffer, int index) {
  Pack8<T> value[N];
  bool there[N], waits[N];
  int m[N], column[N];
  const bool words = step.arrival == Arrival::kWords;
  const T* x = static_cast<const T*>(step.x) + (words ? 2 * int64_t(buffer) : 0);
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int own = index + i * kChainWarps;
    m[i] = input.row(own), column[i] = input.column(own, m[i]);
    there[i] = own < input.all && column[i] < input.K, waits[i] = there[i];
    value[i].bits = make_uint4(0, 0, 0, 0);
  }
  bool more;
  do {
    more = false;
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (waits[i]) value[i].bits = load_words(reinterpret_cast<const uint32_t*>(x + int64_t(m[i]) * step.x_stride + column[i]));
    }
#pragma unroll
    for (int i = 0; i < N; i++) waits[i] = waits[i] && words && !come(value[i].bits), more |= waits[i];
  } while (more);
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (index + i * kChainWarps < input.all) Panels::template put<LOG_ROWS>(rows.staged, rows.zeros, m[i], column[i], value[i], there[i]);
  }
}

// The parts of a group of columns in their order, then the residual. More groups at once take registers that others need.
template <typename Panels, int LOG_ROWS, typename T = typename Panels::Element>
__device__ inline void add_group(const ChainStep<Panels>& step, const ChainRows<T>& rows, const InputGroups<LOG_ROWS>& input, int buffer, int index) {
  const int K = step.K, m = input.row(index), column = input.column(index, m), place = m * K + column, part = rows.M * K / 2;
  const bool there = column < K;
  const int parts = there && step.producer.blocks ? step.producer.parts(column / kPanelRows) : 0;
  const uint32_t* at = static_cast<const uint32_t*>(step.x) + buffer + place / 2;
  Pack8<T> value;
  value.bits = make_uint4(0, 0, 0, 0);
  if (there) value.bits = *reinterpret_cast<const uint4*>((step.residual != nullptr ? step.residual : rows.residual) + place);
  float sum[kLaneColumns]{}, square = 0.0f;
  const auto add = [&](const uint4& bits) {
    Pack8<T> of_part;
    of_part.bits = bits;
#pragma unroll
    for (int j = 0; j < kLaneColumns; j++) sum[j] += to_float(of_part.item[j]);
  };
#pragma unroll 1
  for (int first = 0; first < parts; first += 2, at += 2 * part) {  // two at a time
    const int second = first + 1 < parts ? part : 0;
    uint4 words[2];
    do {
      words[0] = load_words(at), words[1] = load_words(at + second);
    } while (!(come(words[0]) && come(words[1])));
    add(words[0]);
    if (second) add(words[1]);
  }
#pragma unroll
  for (int j = 0; j < kLaneColumns; j++) {
    value.item[j] = from_float<T>(sum[j] + to_float(value.item[j]));
    square += to_float(value.item[j]) * to_float(value.item[j]);
  }
  square = warp_sum(square);
  if (threadIdx.x % 32 == 0) rows.squares[index] = square;
  if (!there) return;
  *reinterpret_cast<uint4*>(rows.residual + place) = value.bits;
  if (step.residual_out != nullptr && column / kGroupColumns % gridDim.x == blockIdx.x) *reinterpret_cast<uint4*>(step.residual_out + place) = value.bits;
}

template <typename Panels, int LOG_ROWS, int N, typename T = typename Panels::Element>
__device__ inline void normalize_groups(const ChainStep<Panels>& step, const ChainRows<T>& rows, const InputGroups<LOG_ROWS>& input,
                                        const float (&scale)[1 << LOG_ROWS], int index) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int own = index + i * kChainWarps;
    if (own >= input.all) return;
    const int m = input.row(own), column = input.column(own, m);
    const bool there = column < input.K;
    Pack8<T> value, weight;
    value.bits = weight.bits = make_uint4(0, 0, 0, 0);
    if (there) {
      value.bits = *reinterpret_cast<const uint4*>(rows.residual + m * input.K + column);
      weight.bits = *reinterpret_cast<const uint4*>(rows.norms + step.norm_at + column);
    }
    float of_row = scale[0];
#pragma unroll
    for (int j = 1; j < 1 << LOG_ROWS; j++) of_row = m == j ? scale[j] : of_row;
#pragma unroll
    for (int j = 0; j < kLaneColumns; j++) value.item[j] = from_float<T>(to_float(value.item[j]) * of_row * to_float(weight.item[j]));
    Panels::template put<LOG_ROWS>(rows.staged, rows.zeros, m, column, value, there);
  }
}

// The first words of a warp are awaited alone: while they have not come, neither have the others, and asking for all of them would be in the way of what
// others read. The squares of a row are summed in an order that depends on K only.
template <typename Panels, int LOG_ROWS, typename T = typename Panels::Element>
__device__ void stage_input(const ChainStep<Panels>& step, const ChainRows<T>& rows, int buffer) {
  constexpr int kRows = 1 << LOG_ROWS, kCopied = LOG_ROWS ? 4 : 2, kNormalized = 1 + LOG_ROWS;
  const InputGroups<LOG_ROWS> input(rows.M, step.K);
  int index = input.first;
  if (step.arrival != Arrival::kParts) {
    if (step.arrival == Arrival::kWords && index < input.all) copy_groups<Panels, LOG_ROWS, 1>(step, rows, input, buffer, index), index += kChainWarps;
#pragma unroll 1
    for (; index < input.all; index += kCopied * kChainWarps) copy_groups<Panels, LOG_ROWS, kCopied>(step, rows, input, buffer, index);
    return meet();
  }
  barrier_wait(rows.norm_barrier, 0);  // they have long come, and asking takes a while
#pragma unroll 1
  for (; index < input.all; index += kChainWarps) add_group<Panels, LOG_ROWS>(step, rows, input, buffer, index);
  meet();
  if (step.norm == nullptr) return;  // the step only writes the sum
  float scale[kRows];
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kRows; m++)
    scale[m] = rsqrtf(warp_sum(lane < input.groups && m < rows.M ? rows.squares[m * input.groups + lane] : 0.0f) / step.K + step.eps);
#pragma unroll 1
  for (index = input.first; index < input.all; index += kNormalized * kChainWarps)
    normalize_groups<Panels, LOG_ROWS, kNormalized>(step, rows, input, scale, index);
  meet();
}

}  // namespace qwen
