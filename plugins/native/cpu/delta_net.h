// A Gated DeltaNet mixer between its projections, as a transaction; graphs/ops/gated_delta_net_op.py has the equations and what pending,
// accepted and commit mean.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace qwen {

// One call. Everything fp32, rows contiguous; P = 0 leaves the four optional pointers unread. Outputs may be the memory of their inputs.
struct DeltaNet {
  int64_t B, T, P, Hk, Hv, Dk, Dv, K;
  const float *qkvz, *ab;                  // [B,T,C+Hv*Dv]: q|k|v|z   [B,T,2*Hv]: a|b
  const float* conv_weight;                // [K,C]: taps first, so that channels are lanes
  const float *decay, *dt_bias, *norm;     // [Hv], -exp(A_log)   [Hv]   [Dv]
  const float *conv_history, *state;       // [B,K-1,C]   [B,Hv,Dk,Dv]: a row per key dimension, so that columns are lanes
  const float *pending_qkvz, *pending_ab;  // [B,P,...] as above; rows from accepted[b] on are never read
  const int64_t *accepted, *commit;        // [B], null: 0 and T
  float *y, *conv_history_out, *state_out;
  float epsilon;
  std::atomic<int>* readers;  // [B*Hk], 0: how many value heads of a key head have read its history

  int64_t channels() const { return 2 * Hk * Dk + Hv * Dv; }
  int64_t width() const { return channels() + Hv * Dv; }
  int64_t kept(int64_t b) const { return accepted ? accepted[b] : 0; }
  int64_t done(int64_t b) const { return commit ? commit[b] : T; }
};

// Rows of q and k, of v and o, are padded with zeros to multiples of these.
constexpr int64_t kRowPad = 16, kColumnPad = 32;
// Tokens that are prepared at a time; the state stays in the second cache between blocks and a part of it in the first within one.
constexpr int64_t kBlock = 32;
constexpr int64_t kTileColumns = 128;  // most columns of the state that are at hand at a time

constexpr int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// Floats of scratch that one task needs. Its start is aligned to 64 bytes.
inline size_t delta_net_scratch(const DeltaNet& net) {
  const int64_t Dk = padded(net.Dk, kRowPad), Dv = padded(net.Dv, kColumnPad);
  const int64_t history = padded((net.K - 1) * (2 * Dk + Dv), kRowPad), tokens = kBlock * (2 * Dk + 2 * Dv + 2);
  return size_t(history + tokens + Dv + Dk * kTileColumns + Dk * Dv);
}

// One value head of one sequence: task = b * Hv + h. Tasks may run at the same time, in any order.
#define QWEN_DELTA_NET(SET) namespace SET { void delta_net_head(const DeltaNet& net, int64_t task, float* scratch); }
QWEN_SETS(QWEN_DELTA_NET)
#undef QWEN_DELTA_NET

}  // namespace qwen
