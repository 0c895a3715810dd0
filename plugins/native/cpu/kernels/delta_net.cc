// One value head of one sequence, from the raw projections to y and the states.

#include "../delta_net.h"

#include "delta_net_rows.h"
#include "delta_net_steps.h"

namespace qwen::QWEN_SET {
namespace {

struct Head {
  const DeltaNet& net;
  int64_t b, h;
  int64_t kept, fresh;  // pending tokens to replay, new tokens to read
  bool commits;
  Rows rows;
  Segment q, k, v;

  const float* ab(int64_t token) const {
    const int64_t width = 2 * net.Hv;
    return token < kept ? net.pending_ab + (b * net.P + token) * width : net.ab + (b * net.T + token - kept) * width;
  }

  // Tokens start .. start+count-1, pending ones first.
  void prepare(int64_t start, int64_t count, float* to_q, float* to_k, float* to_v, float* decay, float* beta, int64_t Dk,
               int64_t Dv) const {
    const int64_t C = net.channels();
    conv_silu(net.K, rows, q, net.conv_weight, C, start, count, to_q, Dk);
    conv_silu(net.K, rows, k, net.conv_weight, C, start, count, to_k, Dk);
    conv_silu(net.K, rows, v, net.conv_weight, C, start, count, to_v, Dv);
    const float scale = 1.0f / sqrtf(float(net.Dk));
    for (int64_t t = 0; t < count; t++) {
      unit(to_q + t * Dk, Dk, scale);
      unit(to_k + t * Dk, Dk, 1.0f);
      gates(net, ab(start + t), h, decay + t, beta + t);
    }
  }

  // New tokens start .. start+count-1 from their o.
  void finish(int64_t start, int64_t count, const float* o, int64_t Dv) const {
    for (int64_t t = 0; t < count; t++) {
      const int64_t token = b * net.T + start + t;
      gated_norm(net, o + t * Dv, net.qkvz + token * net.width() + net.channels() + h * net.Dv, net.y + (token * net.Hv + h) * net.Dv, count == kBlock);
    }
  }
};

Segment copied(const DeltaNet& net, int64_t b, int64_t first, int64_t length, float** to) {
  const int64_t C = net.channels();
  float* local = *to;
  for (int64_t i = 0; i + 1 < net.K; i++)
    std::memcpy(local + i * length, net.conv_history + (b * (net.K - 1) + i) * C + first, size_t(length) * sizeof(float));
  *to += (net.K - 1) * length;
  return {first, length, local};
}

void write_history(const Head& head, const Segment& segment) {
  const DeltaNet& net = head.net;
  const int64_t start = head.kept + (head.commits ? head.fresh : 0);
  for (int64_t i = 0; i + 1 < net.K; i++)
    std::memcpy(net.conv_history_out + (head.b * (net.K - 1) + i) * net.channels() + segment.first,
           head.rows.at(start + i, segment, 0), size_t(segment.length) * sizeof(float));
}

}  // namespace

void delta_net_head(const DeltaNet& net, int64_t task, float* scratch) {
  const int64_t b = task / net.Hv, h = task % net.Hv, ratio = net.Hv / net.Hk, key_head = h / ratio;
  const int64_t Dk = padded(net.Dk, kRowPad), Dv = padded(net.Dv, kColumnPad);
  const int64_t kept = net.kept(b), done = net.done(b), fresh = done ? done : net.T;
  const auto take = [&scratch](int64_t count) {
    float* const taken = scratch;
    scratch += padded(count, kRowPad);
    return taken;
  };

  float* local = take((net.K - 1) * (2 * net.Dk + net.Dv));
  const Segment q = copied(net, b, key_head * net.Dk, net.Dk, &local);
  const Segment k = copied(net, b, (net.Hk + key_head) * net.Dk, net.Dk, &local);
  const Segment v = copied(net, b, 2 * net.Hk * net.Dk + h * net.Dv, net.Dv, &local);
  const float* const pending = net.P ? net.pending_qkvz + b * net.P * net.width() : nullptr;
  const Rows rows = {pending, net.qkvz + b * net.T * net.width(), net.width(), net.K - 1, kept};
  const Head head = {net, b, h, kept, fresh, done > 0, rows, q, k, v};
  // Value heads share the history of their key head, which may be written in place: the last to have read it writes.
  if (net.readers[b * net.Hk + key_head].fetch_add(1, std::memory_order_acq_rel) + 1 == ratio) {
    write_history(head, q);
    write_history(head, k);
  }
  write_history(head, v);

  float* const state = net.state_out + task * net.Dk * net.Dv;
  float *to_q = take(kBlock * Dk), *to_k = take(kBlock * Dk), *to_v = take(kBlock * Dv), *o = take(kBlock * Dv);
  float *decay = take(kBlock), *beta = take(kBlock), *m = take(Dv), *tile = take(Dk * kTileColumns), *beyond = take(Dk * Dv);
  const Tokens tokens = {to_q, to_k, to_v, decay, beta, o, Dk, Dv};

  // `beyond` is the state after tokens that are not committed, from block to block.
  const int64_t total = kept + fresh, keep = head.commits ? total : kept;
  const float* before = net.state + task * net.Dk * net.Dv;
  int64_t start = 0;
  do {
    const int64_t left = total - start, n = left < kBlock ? left : kBlock, first = kept > start ? kept - start : 0;
    head.prepare(start, n, to_q, to_k, to_v, decay, beta, Dk, Dv);
    const int64_t until = keep - start;  // how many of this block are committed; 0: all before it were, and their state is stored
    const bool committed = until >= n;
    const Span span = {n,          first,  committed ? n : until == 0 && start > 0 ? -1 : until, before, state, left > n ? beyond : nullptr,
                       net.Dk, net.Dv, m, tile};
    steps(tokens, span);
    if (first < n) head.finish(start + first - kept, n - first, o + first * Dv, Dv);
    before = committed ? state : beyond;
    start += n;
  } while (start < total);
  // No caller reads these rows, but they are part of the tensor.
  for (int64_t t = fresh; t < net.T; t++) std::memset(net.y + ((b * net.T + t) * net.Hv + h) * net.Dv, 0, size_t(net.Dv) * sizeof(float));
}

}  // namespace qwen::QWEN_SET
