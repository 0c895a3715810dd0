// The input of a step of a chain, as every block gets it: awaited, added to the residual, normalized, in shared memory.
#pragma once

#include "chain_panels.cuh"

namespace qwen {

template <typename T>
struct ChainRows {
  uint8_t* staged;    // chunks of 8 activations (chunk_at)
  float* zeros;       // of the panels' format
  T* residual;        // [M,K], kept from step to step
  float* squares;     // [M, K / 64]
  T* norms;           // [2,K]: the weights of this norm and of the next one
  const uint8_t* parts;
  uint32_t norm_barriers;  // two
  int M;
};

__device__ inline void meet() { asm volatile("bar.sync 1, %0;" ::"n"(kChainThreads) : "memory"); }  // the warps that multiply

// Two columns in each lane: the parts in their order, then the residual.
template <typename Panels, typename T = typename Panels::Element>
__device__ inline void await_parts(const ChainStep<Panels>& step, const ChainRows<T>& rows, uint32_t call) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, K = step.K, groups = K / 64;
  const int64_t part = int64_t(rows.M) * K;
#pragma unroll 1
  for (int m = 0; m < rows.M; m++) {
#pragma unroll 1
    for (int group = (warp - m * groups) & (kChainWarps - 1); group < groups; group += kChainWarps) {
      const int column = group * 64 + lane * 2, parts = rows.parts[step.parts_at + column / kPanelRows];
      const uint2* at = static_cast<const uint2*>(step.x) + int64_t(m) * K + column;
      uint4 words[kMostParts];
#pragma unroll
      for (int i = 0; i < kMostParts; i++) {
        if (i < parts) words[i] = load_words(at + i * part);
      }
      T* kept = rows.residual + m * K + column;
      Pack2<T> value;
      value.bits = *reinterpret_cast<const uint32_t*>(step.residual != nullptr ? step.residual + int64_t(m) * K + column : kept);
      float first = 0.0f, second = 0.0f;
#pragma unroll
      for (int i = 0; i < kMostParts; i++) {
        if (i >= parts) continue;
        await_words(words[i], at + i * part, call);
        first += __uint_as_float(words[i].x), second += __uint_as_float(words[i].z);
      }
      value.item[0] = from_float<T>(first + to_float(value.item[0])), value.item[1] = from_float<T>(second + to_float(value.item[1]));
      *reinterpret_cast<uint32_t*>(kept) = value.bits;
      if (step.residual_out != nullptr && group % gridDim.x == blockIdx.x)
        *reinterpret_cast<uint32_t*>(step.residual_out + int64_t(m) * K + column) = value.bits;
      const float x = to_float(value.item[0]), y = to_float(value.item[1]), square = warp_sum(x * x + y * y);
      if (lane == 0) rows.squares[m * groups + group] = square;
    }
  }
}

// Four columns in each lane, from `get`(m, column).
template <typename Panels, int LOG_ROWS, typename T = typename Panels::Element, typename Get>
__device__ inline void stage_columns(int K, const ChainRows<T>& rows, const Get& get) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, groups = K / 128;
#pragma unroll 1
  for (int m = 0; m < rows.M; m++) {
#pragma unroll 1
    for (int group = (warp - m * groups) & (kChainWarps - 1); group < groups; group += kChainWarps) {
      const int column = group * 128 + lane * 4;
      Panels::template put<LOG_ROWS>(rows.staged, rows.zeros, m, column, get(m, column));
    }
  }
}

// `norms`: how many norms there were before. The squares of a row are summed in an order that depends on K only.
template <typename Panels, int LOG_ROWS, typename T = typename Panels::Element>
__device__ void stage_input(const ChainStep<Panels>& step, const ChainRows<T>& rows, uint32_t call, int& norms) {
  const int K = step.K;
  if (step.arrival == Arrival::kMemory) {
    stage_columns<Panels, LOG_ROWS>(K, rows, [&](int m, int column) {
      Pack4<T> value;
      value.bits = *reinterpret_cast<const uint2*>(static_cast<const T*>(step.x) + int64_t(m) * step.x_stride + column);
      return value;
    });
  } else if (step.arrival == Arrival::kWords) {
    stage_columns<Panels, LOG_ROWS>(K, rows, [&](int m, int column) {
      const uint2* at = static_cast<const uint2*>(step.x) + (int64_t(m) * step.x_stride + column) / 2;
      uint4 words = load_words(at);
      await_words(words, at, call);
      Pack4<T> value;
      value.bits = make_uint2(words.x, words.z);
      return value;
    });
  } else {
    await_parts(step, rows, call);
  }
  meet();
  if (step.norm == nullptr) return;
  const int buffer = norms & 1, squares = K / 64, lane = threadIdx.x % 32;
  if (step.next_norm != nullptr && threadIdx.x == 0) {
    const uint32_t barrier = rows.norm_barriers + (buffer ^ 1) * 8;
    barrier_expect(barrier, K * int(sizeof(T)));
    copy_bulk(shared_of(rows.norms + (buffer ^ 1) * K), step.next_norm, K * int(sizeof(T)), barrier);
  }
  float scale[kMostChainRows];
#pragma unroll
  for (int m = 0; m < 1 << LOG_ROWS; m++) {
    float square = 0.0f;
    for (int i = lane; i < squares && m < rows.M; i += 32) square += rows.squares[m * squares + i];
    scale[m] = rsqrtf(warp_sum(square) / K + step.eps);
  }
  barrier_wait(rows.norm_barriers + buffer * 8, norms >> 1 & 1);
  norms++;
  stage_columns<Panels, LOG_ROWS>(K, rows, [&](int m, int column) {
    Pack4<T> value, weight;
    value.bits = *reinterpret_cast<const uint2*>(rows.residual + m * K + column);
    weight.bits = *reinterpret_cast<const uint2*>(rows.norms + buffer * K + column);
    float own = scale[0];
#pragma unroll
    for (int i = 1; i < 1 << LOG_ROWS; i++) own = m == i ? scale[i] : own;
#pragma unroll
    for (int i = 0; i < 4; i++) value.item[i] = from_float<T>(to_float(value.item[i]) * own * to_float(weight.item[i]));
    return value;
  });
  meet();
}

}  // namespace qwen
