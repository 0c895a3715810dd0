// The recurrence token by token, over a tile of the state's columns. Columns do not see each other and each sums over the key dimension
// in order, so a token's result has the same bits in every tile width and in every call that it may be part of.
//
// Prompts too: with the tile in the first cache this runs at the rate of the multipliers, 4 operations per element and token. The chunked
// (WY) form needs 3 and its scores: measured 7 to 10 % faster for chunks of 16, for other bits wherever a prompt is split.
#pragma once

#include "../delta_net.h"
#include "vector_math.h"

namespace qwen::QWEN_SET {

// Tokens of one head: q, k [n, key_stride], v, o [n, value_stride], decay (e^g) and beta [n].
struct Tokens {
  const float *q, *k, *v, *decay, *beta;
  float* o;
  int64_t key_stride, value_stride;
};

// m = S^T k, the state as it is stored
template <int NV>
inline void read_key(const float* S, int64_t stride, int64_t Dk, const float* k, Vector* m) {
  for (int j = 0; j < NV; j++) m[j] = Vector{};
  for (int64_t i = 0; i < Dk; i++)
    for (int j = 0; j < NV; j++) m[j] = fma(all(k[i]), load(S + i * stride + j * kStep), m[j]);
}

// One pass over the tile: S' = decay S + k delta^T, stored at `to` where STORE; o = S'^T q where QUERY; m = S'^T next where NEXT.
template <int NV, bool STORE, bool QUERY, bool NEXT>
inline void pass(const float* S, int64_t stride, float* to, int64_t to_stride, int64_t Dk, float decay, const float* k, const float* q,
                 const float* next, const Vector* delta, Vector* o, Vector* m) {
  Vector sum_o[NV] = {}, sum_m[NV] = {}, d[NV];
  for (int j = 0; j < NV; j++) d[j] = delta[j];
  const Vector shrink = all(decay);
  for (int64_t i = 0; i < Dk; i++) {
    const Vector key = all(k[i]);
    for (int j = 0; j < NV; j++) {
      const Vector s = fma(key, d[j], shrink * load(S + i * stride + j * kStep));
      if (STORE) store(to + i * to_stride + j * kStep, s);
      if (QUERY) sum_o[j] = fma(all(q[i]), s, sum_o[j]);
      if (NEXT) sum_m[j] = fma(all(next[i]), s, sum_m[j]);
    }
  }
  for (int j = 0; j < NV; j++) o[j] = sum_o[j], m[j] = sum_m[j];
}

template <int NV>
inline void any_pass(bool stores, bool queries, bool continues, const float* S, int64_t stride, float* to, int64_t to_stride, int64_t Dk,
                     float decay, const float* k, const float* q, const float* next, const Vector* delta, Vector* o, Vector* m) {
#define QWEN_PASS(a, b, c) pass<NV, a, b, c>(S, stride, to, to_stride, Dk, decay, k, q, next, delta, o, m)
  if (!stores) return QWEN_PASS(false, true, false);  // only the last token of a call, which is not replayed
  if (queries) return continues ? QWEN_PASS(true, true, true) : QWEN_PASS(true, true, false);
  return continues ? QWEN_PASS(true, false, true) : QWEN_PASS(true, false, false);
#undef QWEN_PASS
}

// Where a block begins and what is wanted of it. The states are [Dk,Dv] and may be the same memory.
struct Span {
  int64_t n;            // tokens
  int64_t first;        // outputs are wanted from this token on
  int64_t keep;         // `kept` gets the state after this many tokens, none if negative
  const float* before;
  float *kept, *end;    // `end` gets the state after all tokens, if not null and keep < n
  int64_t Dk, Dv;
  float *m, *tile;      // scratch: [Dv], padded, and [Dk, kTileColumns]
};

// m = S^T k of the first token, `columns` from `column` on.
template <int NV>
inline void read_columns(const Span& span, const float* k, int64_t column, int64_t columns) {
  Vector m[NV];
  if (columns < kStep) {
    m[0] = Vector{};
    for (int64_t i = 0; i < span.Dk; i++) m[0] = fma(all(k[i]), load_part(span.before + i * span.Dv + column, size_t(columns)), m[0]);
  } else {
    read_key<NV>(span.before + column, span.Dv, span.Dk, k, m);
  }
  for (int j = 0; j < NV; j++) store(span.m + column + j * kStep, m[j]);
}

// All tokens over NV vectors of columns; `columns` < kStep: only so many are there.
template <int NV>
inline void tile_steps(const Tokens& tokens, const Span& span, int64_t column, int64_t columns) {
  constexpr int64_t kWidth = NV * kStep;
  const bool whole = columns >= kWidth;
  const float* from = span.before + column;
  int64_t from_stride = span.Dv;
  if (!whole) {
    for (int64_t i = 0; i < span.Dk; i++) store(span.tile + i * kWidth, load_part(from + i * span.Dv, size_t(columns)));
    from = span.tile, from_stride = kWidth;
  }
  const auto save = [&](float* to) {
    const size_t bytes = size_t(whole ? kWidth : columns) * sizeof(float);
    for (int64_t i = 0; i < span.Dk; i++) std::memcpy(to + i * span.Dv + column, from + i * from_stride, bytes);
  };
  if (span.keep == 0 && span.before != span.kept) save(span.kept);
  Vector m[NV], o[NV], delta[NV];
  for (int j = 0; j < NV; j++) m[j] = load(span.m + column + j * kStep);
  for (int64_t t = 0; t < span.n; t++) {
    const float *k = tokens.k + t * tokens.key_stride, *q = tokens.q + t * tokens.key_stride;
    const float* v = tokens.v + t * tokens.value_stride + column;
    const float decay = tokens.decay[t], beta = tokens.beta[t];
    for (int j = 0; j < NV; j++) delta[j] = all(beta) * fma(all(-decay), m[j], load(v + j * kStep));
    const bool last = t + 1 == span.n;
    float* const target = t + 1 == span.keep ? span.kept : last ? span.end : nullptr;
    const bool straight = last && whole && target;
    float* const to = straight ? target + column : span.tile;
    const int64_t to_stride = straight ? span.Dv : kWidth;
    any_pass<NV>(!last || target, t >= span.first, !last, from, from_stride, to, to_stride, span.Dk, decay, k, q, k + tokens.key_stride,
                 delta, o, m);
    from = to, from_stride = to_stride;
    if (target && !straight) save(target);
    if (t >= span.first)
      for (int j = 0; j < NV; j++) store(tokens.o + t * tokens.value_stride + column + j * kStep, o[j]);
  }
}

// Calls work<NV>(column, columns left) for runs of up to WIDEST vectors.
#define QWEN_COLUMNS(WIDEST, work, ...)                               \
  for (int64_t column = 0; column < span.Dv;) {                       \
    const int64_t left = span.Dv - column, vectors = left / kStep;    \
    if (WIDEST >= 8 && vectors >= 8) {                                \
      work<8>(__VA_ARGS__, column, left), column += 8 * kStep;        \
    } else if (vectors >= 4) {                                        \
      work<4>(__VA_ARGS__, column, left), column += 4 * kStep;        \
    } else if (vectors >= 2) {                                        \
      work<2>(__VA_ARGS__, column, left), column += 2 * kStep;        \
    } else {                                                          \
      work<1>(__VA_ARGS__, column, left), column += kStep;            \
    }                                                                 \
  }

inline void steps(const Tokens& tokens, const Span& span) {
  if (span.n) QWEN_COLUMNS(8, read_columns, span, tokens.k)
  // One token streams through whole rows of the state; more stay in a tile that fits the first cache.
  if (span.n == 1 && kLanes == 16) {
    QWEN_COLUMNS(8, tile_steps, tokens, span)
  } else {
    QWEN_COLUMNS(4, tile_steps, tokens, span)
  }
}
#undef QWEN_COLUMNS

}  // namespace qwen::QWEN_SET
