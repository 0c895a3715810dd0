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
  const uint8_t* parts;
  uint32_t norm_barrier;
  int M;
};

__device__ inline void meet() { asm volatile("bar.sync 1, %0;" ::"n"(kChainThreads) : "memory"); }  // the warps that multiply

constexpr int kLaneColumns = 8, kGroupColumns = 32 * kLaneColumns;  // a warp takes a group of columns of a row at a time
constexpr int kMostNormColumns = 32 * kGroupColumns;  // a warp adds up the squares of a row's groups

// get(m, group, column, there) for all groups of columns. In the last one lanes may have no columns: `there` is false.
template <typename Get>
__device__ inline void each_group(int M, int K, const Get& get) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, groups = (K + kGroupColumns - 1) / kGroupColumns;
#pragma unroll 1
  for (int m = 0; m < M; m++) {
#pragma unroll 1
    for (int group = (warp - m * groups) & (kChainWarps - 1); group < groups; group += kChainWarps) {
      const int column = group * kGroupColumns + lane * kLaneColumns;
      get(m, group, column, column < K);
    }
  }
}

// The parts in their order, then the residual.
template <typename Panels, typename T = typename Panels::Element>
__device__ inline void await_parts(const ChainStep<Panels>& step, const ChainRows<T>& rows, int buffer) {
  const int K = step.K, groups = (K + kGroupColumns - 1) / kGroupColumns, part = rows.M * K;
  each_group(rows.M, K, [&](int m, int group, int column, bool there) {
    const int parts = there ? rows.parts[step.parts_at + column / kPanelRows] : 0;
    const uint32_t* at = static_cast<const uint32_t*>(step.x) + buffer + m * K + column;
    T* kept = rows.residual + m * K + column;
    float sum[kLaneColumns]{}, square = 0.0f;
    Pack8<T> value;
    value.bits = make_uint4(0, 0, 0, 0);
    if (there) value.bits = *reinterpret_cast<const uint4*>(step.residual != nullptr ? step.residual + int64_t(m) * K + column : kept);
#pragma unroll 1
    for (int first = 0; first < parts; first += 2, at += 2 * part) {  // two at a time
      const int second = first + 1 < parts ? part : 0;
      uint4 words[4];
      do {
        words[0] = load_words(at), words[1] = load_words(at + 4);
        words[2] = load_words(at + second), words[3] = load_words(at + second + 4);
      } while (!(come(words[0]) && come(words[1]) && come(words[2]) && come(words[3])));
      const auto add = [&](const uint4& low, const uint4& high) {
        sum[0] += __uint_as_float(low.x), sum[1] += __uint_as_float(low.y), sum[2] += __uint_as_float(low.z), sum[3] += __uint_as_float(low.w);
        sum[4] += __uint_as_float(high.x), sum[5] += __uint_as_float(high.y), sum[6] += __uint_as_float(high.z), sum[7] += __uint_as_float(high.w);
      };
      add(words[0], words[1]);
      if (second) add(words[2], words[3]);
    }
#pragma unroll
    for (int i = 0; i < kLaneColumns; i++) {
      value.item[i] = from_float<T>(sum[i] + to_float(value.item[i]));
      square += to_float(value.item[i]) * to_float(value.item[i]);
    }
    square = warp_sum(square);
    if (threadIdx.x % 32 == 0) rows.squares[m * groups + group] = square;
    if (!there) return;
    *reinterpret_cast<uint4*>(kept) = value.bits;
    if (step.residual_out != nullptr && group % gridDim.x == blockIdx.x)
      *reinterpret_cast<uint4*>(step.residual_out + int64_t(m) * K + column) = value.bits;
  });
}

// The squares of a row are summed in an order that depends on K only.
template <typename Panels, int LOG_ROWS, typename T = typename Panels::Element>
__device__ void stage_input(const ChainStep<Panels>& step, const ChainRows<T>& rows, int buffer) {
  const int K = step.K;
  if (step.arrival == Arrival::kParts) {
    await_parts(step, rows, buffer);
    meet();
    if (step.norm == nullptr) return;  // the step only writes the sum
  }
  const int groups = (K + kGroupColumns - 1) / kGroupColumns, lane = threadIdx.x % 32;
  float scale[kMostChainRows];
  if (step.arrival == Arrival::kParts) {
#pragma unroll
    for (int m = 0; m < 1 << LOG_ROWS; m++)
      scale[m] = rsqrtf(warp_sum(lane < groups && m < rows.M ? rows.squares[m * groups + lane] : 0.0f) / K + step.eps);
    barrier_wait(rows.norm_barrier, 0);
  }
  each_group(rows.M, K, [&](int m, int, int column, bool there) {
    Pack8<T> value;
    value.bits = make_uint4(0, 0, 0, 0);
    if (!there) {
    } else if (step.arrival == Arrival::kMemory) {
      value.bits = *reinterpret_cast<const uint4*>(static_cast<const T*>(step.x) + int64_t(m) * step.x_stride + column);
    } else if (step.arrival == Arrival::kWords) {
      const uint32_t* at = static_cast<const uint32_t*>(step.x) + buffer + (int64_t(m) * step.x_stride + column) / 2;
      do {
        value.bits = load_words(at);
      } while (!come(value.bits));
    } else {
      Pack8<T> weight;
      value.bits = *reinterpret_cast<const uint4*>(rows.residual + m * K + column);
      weight.bits = *reinterpret_cast<const uint4*>(rows.norms + step.norm_at + column);
      float own = scale[0];
#pragma unroll
      for (int i = 1; i < 1 << LOG_ROWS; i++) own = m == i ? scale[i] : own;
#pragma unroll
      for (int i = 0; i < kLaneColumns; i++) value.item[i] = from_float<T>(to_float(value.item[i]) * own * to_float(weight.item[i]));
    }
    Panels::template put<LOG_ROWS>(rows.staged, rows.zeros, m, column, value, there);
  });
  meet();
}

}  // namespace qwen
