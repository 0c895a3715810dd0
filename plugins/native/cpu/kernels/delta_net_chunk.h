// The recurrence a chunk at a time (WY form; Gated Delta Networks, arXiv 2412.06464, section 3.3). With decays e^{g_i} of a chunk's tokens,
//
//   G_ij = product of e^{g} over j < s <= i      G_i = product over s <= i
//   X = (I + A)^-1 diag(beta) (V - diag(G_i) K S)     A_ij = beta_i G_ij (k_i . k_j),  j < i
//   O = diag(G_i) Q S + P X                           P_ij = G_ij (q_i . k_j),  j <= i
//   S <- G_L S + sum_i G_Li k_i x_i^T
//
// G is built by multiplying its rows on, never by differences of logarithms: no overflow under strong decay, no cancellation. The unit lower
// triangular system is solved forward, which is as exact as the sequential form however the keys correlate.
#pragma once

#include "../delta_net.h"
#include "vector_math.h"

namespace qwen::QWEN_SET {

// A register tile: kTileRows rows by kPanelVectors vectors.
constexpr int kTileRows = kStep == 16 ? 8 : 4, kPanelVectors = 2, kPanel = kPanelVectors * int(kStep);
static_assert(kChunk % kPanel == 0 && kChunk % kTileRows == 0 && kColumnPad % kPanel == 0 && kRowPad % kTileRows == 0);

// Buffers of one head. Matrices of the state's width are cut into panels of kPanel columns, each [rows, kPanel].
struct Chunk {
  float *q, *k, *v, *o;  // [kChunk, Dk], [kChunk, Dv], padded
  float *decay, *beta;   // [kChunk]
  float* S;              // panels of [Dk, kPanel]
  float* keys;           // k transposed: panels of [Dk, kPanel]
  float *G, *A, *P;      // [kChunk, kChunk]; A negated
  float *from_start;     // G_i, [kChunk]
  float* X;              // one panel [kChunk, kPanel]
  int64_t Dk, Dv;        // padded
};

typedef Vector Tile[kTileRows][kPanelVectors];

// tile += a b for a [kTileRows, depth] (rows of `stride`) and b [depth, kPanel]
inline void multiply(Tile& tile, const float* a, int64_t stride, const float* b, int64_t depth) {
  for (int64_t i = 0; i < depth; i++) {
    Vector x[kPanelVectors];
    for (int c = 0; c < kPanelVectors; c++) x[c] = load(b + i * kPanel + c * kStep);
    for (int r = 0; r < kTileRows; r++)
      for (int c = 0; c < kPanelVectors; c++) tile[r][c] = fma(all(a[r * stride + i]), x[c], tile[r][c]);
  }
}

// tile += a^T b for a [depth, kTileRows] (rows of `stride`)
inline void multiply_transposed(Tile& tile, const float* a, int64_t stride, const float* b, int64_t depth) {
  for (int64_t i = 0; i < depth; i++) {
    Vector x[kPanelVectors];
    for (int c = 0; c < kPanelVectors; c++) x[c] = load(b + i * kPanel + c * kStep);
    for (int r = 0; r < kTileRows; r++)
      for (int c = 0; c < kPanelVectors; c++) tile[r][c] = fma(all(a[i * stride + r]), x[c], tile[r][c]);
  }
}

// state [Dk,Dv] <-> panels
inline void read_state(const Chunk& chunk, const float* state, int64_t Dk, int64_t Dv) {
  std::memset(chunk.S, 0, size_t(chunk.Dk * chunk.Dv) * sizeof(float));
  for (int64_t column = 0; column < Dv; column += kPanel) {
    const int64_t left = Dv - column, count = left < kPanel ? left : kPanel;
    for (int64_t i = 0; i < Dk; i++) std::memcpy(chunk.S + column * chunk.Dk + i * kPanel, state + i * Dv + column, size_t(count) * sizeof(float));
  }
}

inline void write_state(const Chunk& chunk, float* state, int64_t Dk, int64_t Dv) {
  for (int64_t column = 0; column < Dv; column += kPanel) {
    const int64_t left = Dv - column, count = left < kPanel ? left : kPanel;
    for (int64_t i = 0; i < Dk; i++) std::memcpy(state + i * Dv + column, chunk.S + column * chunk.Dk + i * kPanel, size_t(count) * sizeof(float));
  }
}

// G, -A and P of `rows` tokens (a multiple of kTileRows).
inline void chunk_scores(const Chunk& chunk, int64_t rows) {
  const int64_t Dk = chunk.Dk;
  float* G = chunk.G;
  std::memset(G, 0, size_t(kChunk) * sizeof(float));
  for (int64_t i = 0; i < rows; i++) {
    const float decay = chunk.decay[i];
    chunk.from_start[i] = i ? decay * chunk.from_start[i - 1] : decay;
    if (i)
      for (int64_t j = 0; j < kChunk; j += kStep) store(G + i * kChunk + j, all(decay) * load(G + (i - 1) * kChunk + j));
    G[i * kChunk + i] = 1;
  }
  for (int64_t j = 0; j < rows; j++)
    for (int64_t i = 0; i < Dk; i++) chunk.keys[j / kPanel * kPanel * Dk + i * kPanel + j % kPanel] = chunk.k[j * Dk + i];
  for (int64_t column = 0; column < rows; column += kPanel)
    for (int64_t row = column / kTileRows * kTileRows; row < rows; row += kTileRows) {
      Tile keys = {}, queries = {};
      multiply(keys, chunk.k + row * Dk, Dk, chunk.keys + column * Dk, Dk);
      multiply(queries, chunk.q + row * Dk, Dk, chunk.keys + column * Dk, Dk);
      for (int r = 0; r < kTileRows; r++)
        for (int c = 0; c < kPanelVectors; c++) {
          const int64_t at = (row + r) * kChunk + column + c * kStep;
          store(chunk.A + at, all(-chunk.beta[row + r]) * load(G + at) * keys[r][c]);
          store(chunk.P + at, load(G + at) * queries[r][c]);
        }
    }
}

// Rows row .. row+kTileRows-1 of X, given those before.
inline void solve_rows(const Chunk& chunk, const float* S, int64_t row, int64_t column) {
  Tile x = {};
  multiply(x, chunk.k + row * chunk.Dk, chunk.Dk, S, chunk.Dk);
  for (int r = 0; r < kTileRows; r++)
    for (int c = 0; c < kPanelVectors; c++) {
      const Vector v = load(chunk.v + (row + r) * chunk.Dv + column + c * kStep);
      x[r][c] = all(chunk.beta[row + r]) * fma(all(-chunk.from_start[row + r]), x[r][c], v);
    }
  const float* A = chunk.A + row * kChunk;
  multiply(x, A, kChunk, chunk.X, row);
  for (int r = 0; r < kTileRows; r++)
    for (int s = r + 1; s < kTileRows; s++)
      for (int c = 0; c < kPanelVectors; c++) x[s][c] = fma(all(A[s * kChunk + row + r]), x[r][c], x[s][c]);
  for (int r = 0; r < kTileRows; r++)
    for (int c = 0; c < kPanelVectors; c++) store(chunk.X + (row + r) * kPanel + c * kStep, x[r][c]);
}

inline void output_rows(const Chunk& chunk, const float* S, int64_t row, int64_t column) {
  Tile o = {};
  multiply(o, chunk.q + row * chunk.Dk, chunk.Dk, S, chunk.Dk);
  for (int r = 0; r < kTileRows; r++)
    for (int c = 0; c < kPanelVectors; c++) o[r][c] *= all(chunk.from_start[row + r]);
  multiply(o, chunk.P + row * kChunk, kChunk, chunk.X, row + kTileRows);
  for (int r = 0; r < kTileRows; r++)
    for (int c = 0; c < kPanelVectors; c++) store(chunk.o + (row + r) * chunk.Dv + column + c * kStep, o[r][c]);
}

inline void update_state(const Chunk& chunk, float* S, int64_t rows) {
  const float* to_end = chunk.G + (rows - 1) * kChunk;
  for (int64_t i = 0; i < rows; i++)
    for (int c = 0; c < kPanelVectors; c++) {
      float* x = chunk.X + i * kPanel + c * kStep;
      store(x, all(to_end[i]) * load(x));
    }
  const Vector shrink = all(chunk.from_start[rows - 1]);
  for (int64_t i = 0; i < chunk.Dk; i += kTileRows) {
    Tile s;
    for (int r = 0; r < kTileRows; r++)
      for (int c = 0; c < kPanelVectors; c++) s[r][c] = shrink * load(S + (i + r) * kPanel + c * kStep);
    multiply_transposed(s, chunk.k + i, chunk.Dk, chunk.X, rows);
    for (int r = 0; r < kTileRows; r++)
      for (int c = 0; c < kPanelVectors; c++) store(S + (i + r) * kPanel + c * kStep, s[r][c]);
  }
}

// One chunk of `count` tokens: q, k, v, decay, beta -> o and the state after it. Rows up to the next multiple of kTileRows become neutral.
inline void advance(const Chunk& chunk, int64_t count) {
  const int64_t rows = padded(count, kTileRows);
  for (int64_t i = count; i < rows; i++) {
    std::memset(chunk.q + i * chunk.Dk, 0, size_t(chunk.Dk) * sizeof(float));
    std::memset(chunk.k + i * chunk.Dk, 0, size_t(chunk.Dk) * sizeof(float));
    std::memset(chunk.v + i * chunk.Dv, 0, size_t(chunk.Dv) * sizeof(float));
    chunk.decay[i] = 1, chunk.beta[i] = 0;
  }
  chunk_scores(chunk, rows);
  for (int64_t column = 0; column < chunk.Dv; column += kPanel) {
    float* S = chunk.S + column * chunk.Dk;
    for (int64_t row = 0; row < rows; row += kTileRows) solve_rows(chunk, S, row, column);
    for (int64_t row = 0; row < rows; row += kTileRows) output_rows(chunk, S, row, column);
    update_state(chunk, S, rows);
  }
}

}  // namespace qwen::QWEN_SET
