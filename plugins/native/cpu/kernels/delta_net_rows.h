// What a token brings to the recurrence of one value head: convolved and normalized q, k, v and its gates; and what leaves it, normed and
// gated.
#pragma once

#include "../delta_net.h"
#include "vector_math.h"

namespace qwen::QWEN_SET {

// Inputs are read a block ahead: the channels of a head are short runs far apart, which the processor does not foresee.

// A run of channels of the convolution: q or k of a key head, v of a value head. Its history is a copy, because others may write it.
struct Segment {
  int64_t first, length;
  const float* history;  // [K-1, length]
};

// Inputs of one sequence as one sequence of rows: history (0 .. K-2), accepted pending tokens, new tokens.
struct Rows {
  const float *pending, *fresh;
  int64_t width, before, kept;  // before = K-1

  // Channel `offset` of the segment in a row.
  const float* at(int64_t row, const Segment& segment, int64_t offset) const {
    if (row < before) return segment.history + row * segment.length + offset;
    row -= before;
    return (row < kept ? pending + row * width : fresh + (row - kept) * width) + segment.first + offset;
  }
};

// SiLU(causal depthwise conv) of `count` tokens from token `start` (0: the first after the history) -> out rows of `stride`, padding zero.
template <int K>
inline void conv_silu(const Rows& rows, const Segment& segment, const float* weight, int64_t C, int64_t start, int64_t count, float* out,
                      int64_t stride) {
  for (int64_t i = 0; i < stride; i += kStep) {
    const int64_t left = segment.length - i, part = left < kStep ? left : kStep;
    if (part <= 0) {
      for (int64_t t = 0; t < count; t++) store(out + t * stride + i, Vector{});
      continue;
    }
    const int64_t channel = segment.first + i;
    const auto read = [&](const float* p) { return part == kStep ? load(p) : load_part(p, size_t(part)); };
    const auto row = [&](int64_t r) {
      const float* const at = rows.at(r, segment, i);
      if (count == kBlock) __builtin_prefetch(at + kBlock * rows.width, 0, 2);
      return read(at);
    };
    Vector tap[K], window[K];
    for (int j = 0; j < K; j++) tap[j] = read(weight + j * C + channel);
    for (int j = 0; j + 1 < K; j++) window[j + 1] = row(start + j);
    for (int64_t t = 0; t < count; t++) {
      for (int j = 0; j + 1 < K; j++) window[j] = window[j + 1];
      window[K - 1] = row(start + t + K - 1);
      Vector u = tap[0] * window[0];
      for (int j = 1; j < K; j++) u = fma(tap[j], window[j], u);
      store(out + t * stride + i, swish(u));
    }
  }
}

inline void conv_silu(int64_t K, const Rows& rows, const Segment& segment, const float* weight, int64_t C, int64_t start, int64_t count,
                      float* out, int64_t stride) {
  if (K == 2) return conv_silu<2>(rows, segment, weight, C, start, count, out, stride);
  if (K == 3) return conv_silu<3>(rows, segment, weight, C, start, count, out, stride);
  return conv_silu<4>(rows, segment, weight, C, start, count, out, stride);
}

// x <- x / sqrt(|x|^2 + 1e-6) * scale
inline void unit(float* x, int64_t stride, float scale) {
  Vector squares = {};
  for (int64_t i = 0; i < stride; i += kStep) squares = fma(load(x + i), load(x + i), squares);
  const Vector factor = all(scale / sqrtf(sum(squares) + 1e-6f));
  for (int64_t i = 0; i < stride; i += kStep) store(x + i, load(x + i) * factor);
}

// e^g and beta of a token of head h.
inline void gates(const DeltaNet& net, const float* ab, int64_t h, float* decay, float* beta) {
  const float x = ab[h] + net.dt_bias[h];
  const float softplus = x > 20.0f ? x : log1pf(expf(x));
  *decay = expf(net.decay[h] * softplus);
  *beta = 1.0f / (1.0f + expf(-ab[net.Hv + h]));
}

// y = o / sqrt(mean(o^2) + eps) * norm * SiLU(z)
inline void gated_norm(const DeltaNet& net, const float* o, const float* z, float* y, bool block) {
  for (int64_t i = 0; block && i < net.Dv; i += kRowPad) {
    __builtin_prefetch(z + kBlock * net.width() + i, 0, 2);
    __builtin_prefetch(y + kBlock * net.Hv * net.Dv + i, 1, 2);
  }
  Vector squares = {};
  for (int64_t i = 0; i < net.Dv; i += kStep) squares = fma(load(o + i), load(o + i), squares);
  const Vector factor = all(1.0f / sqrtf(sum(squares) / float(net.Dv) + net.epsilon));
  for (int64_t i = 0; i < net.Dv; i += kStep) {
    const int64_t left = net.Dv - i;
    if (left >= kStep) {
      store(y + i, load(o + i) * factor * load(net.norm + i) * swish(load(z + i)));
    } else {
      store_part(y + i, load(o + i) * factor * load_part(net.norm + i, size_t(left)) * swish(load_part(z + i, size_t(left))), left);
    }
  }
}

}  // namespace qwen::QWEN_SET
