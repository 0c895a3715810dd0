// The recurrence token by token, over a tile of the state's columns. Columns do not see each other and each sums over the key dimension
// in order, so a token's result has the same bits in every tile width and in every call that it may be part of.
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

// m = S^T k, the state as it lies
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
  if (!stores) return QWEN_PASS(false, true, false);  // only the last token of a call is not stored
  if (queries) return continues ? QWEN_PASS(true, true, true) : QWEN_PASS(true, true, false);
  return continues ? QWEN_PASS(true, false, true) : QWEN_PASS(true, false, false);
#undef QWEN_PASS
}

// Tokens 0 .. n-1 over NV vectors of columns from `column` on; outputs from token `first` on. `after` gets the state after `keep` tokens.
// Both have rows of `stride`; `tile` is scratch [Dk, NV vectors]. `columns` < kStep: only so many are there.
template <int NV>
inline void tile_steps(const Tokens& tokens, int64_t n, int64_t first, int64_t keep, const float* before, float* after, int64_t stride,
                       int64_t Dk, int64_t column, int64_t columns, float* tile) {
  constexpr int64_t kWidth = NV * kStep;
  const bool whole = columns >= kWidth;
  const float* from = before + column;
  int64_t from_stride = stride;
  if (!whole) {
    for (int64_t i = 0; i < Dk; i++) store(tile + i * kWidth, load_part(from + i * stride, size_t(columns)));
    from = tile, from_stride = kWidth;
  }
  const auto save = [&](const float* S, int64_t S_stride) {
    for (int64_t i = 0; i < Dk; i++) std::memcpy(after + i * stride + column, S + i * S_stride, size_t(whole ? kWidth : columns) * sizeof(float));
  };
  if (keep == 0 && before != after) save(from, from_stride);
  if (n == 0) return;
  Vector m[NV], o[NV], delta[NV];
  read_key<NV>(from, from_stride, Dk, tokens.k, m);
  for (int64_t t = 0; t < n; t++) {
    const float *k = tokens.k + t * tokens.key_stride, *q = tokens.q + t * tokens.key_stride;
    const float* v = tokens.v + t * tokens.value_stride + column;
    const float decay = tokens.decay[t], beta = tokens.beta[t];
    for (int j = 0; j < NV; j++) delta[j] = all(beta) * fma(all(-decay), m[j], load(v + j * kStep));
    const bool last = t + 1 == n, stores = !last || keep == n, straight = last && whole;
    float* to = straight ? after + column : tile;
    any_pass<NV>(stores, t >= first, !last, from, from_stride, to, straight ? stride : kWidth, Dk, decay, k, q, k + tokens.key_stride, delta,
                 o, m);
    if (t >= first)
      for (int j = 0; j < NV; j++) store(tokens.o + t * tokens.value_stride + column + j * kStep, o[j]);
    if (t + 1 == keep && !straight) save(tile, kWidth);
    from = tile, from_stride = kWidth;
  }
}

// The same for a head. before, after [Dk,Dv] may be the same memory.
inline void steps(const Tokens& tokens, int64_t n, int64_t first, int64_t keep, const float* before, float* after, int64_t Dk, int64_t Dv,
                  float* tile) {
  // One token streams through whole rows of the state; more stay in a tile that fits the first cache.
  constexpr int kWide = kStep == 16 ? 8 : 4;
  for (int64_t column = 0; column < Dv;) {
    const int64_t left = Dv - column, vectors = left / kStep;
#define QWEN_TILE(NV) tile_steps<NV>(tokens, n, first, keep, before, after, Dv, Dk, column, left, tile), column += NV * kStep
    if (n == 1 && vectors >= kWide) {
      QWEN_TILE(kWide);
    } else if (vectors >= 4) {
      QWEN_TILE(4);
    } else if (vectors >= 2) {
      QWEN_TILE(2);
    } else {
      QWEN_TILE(1);
    }
#undef QWEN_TILE
  }
}

}  // namespace qwen::QWEN_SET
