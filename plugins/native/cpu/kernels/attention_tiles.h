// The two products of attention, in tiles of registers: scores of some queries with cache rows, and sums of cache rows weighted by them. Each
// result is summed in one order, whatever rows share its tile. Included by kernels only.
#pragma once

#include "vector_math.h"

namespace qwen {
namespace QWEN_SET {

// Accumulators stay in registers only where every loop over them is unrolled.
#define UNROLL _Pragma("GCC unroll 8")

// A tile has kTileRows queries by four cache rows, or by four vectors of values.
constexpr int64_t kTileRows = kRegisters == 32 ? 6 : 3, kTileColumns = 4;

// Row `j` behind a cache row, rows being `row` bytes apart.
template <typename W>
inline const W* at_row(const W* from, int64_t j, int64_t row) {
  return reinterpret_cast<const W*>(reinterpret_cast<const unsigned char*>(from) + j * row);
}

// Queries of a tile are packed: a vector of each in turn.
inline float* packed(float* tile, int64_t rows, int64_t row, int64_t d) { return tile + (d / kStep * rows + row) * kStep + d % kStep; }

// Scores [R,4] of a packed tile with four cache rows k[0..3] of D values, to rows of `stride`. `Ahead` rows of D values, which will be
// needed soon, are fetched from each of `next`; they are `row` bytes apart. W is what a cache stores of a value.
template <size_t R, int64_t Ahead, typename W>
void scores(const float* q, const W* const* k, int64_t D, int64_t row, float* to, int64_t stride, const W* const* next) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(W));
  const W *k0 = k[0], *k1 = k[1], *k2 = k[2], *k3 = k[3];
  Vector sum[kTileColumns][R];
  UNROLL for (size_t r = 0; r < R; r++) sum[0][r] = sum[1][r] = sum[2][r] = sum[3][r] = Vector{};
  W rest[kTileColumns][kLanes];
  for (int64_t size = D / kStep * kStep;;) {
    for (int64_t d = 0; d < size; d += kStep, q += R * kLanes) {
      for (int64_t c = 0; c < Ahead && d % kLine == 0; c++) {
        __builtin_prefetch(at_row(next[0], c, row) + d, 0, 3);
        __builtin_prefetch(at_row(next[1], c, row) + d, 0, 3);
      }
      const Vector keys[] = {load(k0 + d), load(k1 + d), load(k2 + d), load(k3 + d)};
      UNROLL for (size_t r = 0; r < R; r++) {
        const Vector in = load(q + r * kLanes);
        UNROLL for (int64_t c = 0; c < kTileColumns; c++) sum[c][r] = fma(keys[c], in, sum[c][r]);
      }
    }
    if (D % kStep == 0 || k0 == rest[0]) break;
    for (int64_t c = 0; c < kTileColumns; c++) {
      std::memset(rest[c], 0, sizeof(rest[c]));
      std::memcpy(rest[c], k[c] + size, size_t(D - size) * sizeof(W));
    }
    k0 = rest[0], k1 = rest[1], k2 = rest[2], k3 = rest[3], size = kStep;
  }
  UNROLL for (size_t r = 0; r < R; r++) {
    const Four four = sums(sum[0][r], sum[1][r], sum[2][r], sum[3][r]);
    std::memcpy(to + r * stride, &four, sizeof(four));
  }
}

// o[r] += sum over `count` cache rows of p[r][j] v[j], for C vectors of values; o has rows of `width`, p of `stride`, v of `row` bytes.
// `begins`: o is not read, as if it were 0.
template <size_t R, size_t C, typename W>
void weighted(bool begins, const float* p, int64_t stride, const W* v, int64_t row, int64_t count, float* o, int64_t width) {
  Vector sum[R][C];
  UNROLL for (size_t r = 0; r < R; r++) {
    UNROLL for (size_t c = 0; c < C; c++) sum[r][c] = begins ? Vector{} : load(o + r * width + c * kLanes);
  }
  for (int64_t j = 0; j < count; j++, v = at_row(v, 1, row)) {
    Vector values[C];
    UNROLL for (size_t c = 0; c < C; c++) values[c] = load(v + c * kLanes);
    UNROLL for (size_t r = 0; r < R; r++) {
      const Vector weight = all(p[r * stride + j]);
      UNROLL for (size_t c = 0; c < C; c++) sum[r][c] = fma(weight, values[c], sum[r][c]);
    }
  }
  UNROLL for (size_t r = 0; r < R; r++) {
    UNROLL for (size_t c = 0; c < C; c++) store(o + r * width + c * kLanes, sum[r][c]);
  }
}

// The same for all values of a row.
template <size_t R, typename W>
void weighted_rows(bool begins, const float* p, int64_t stride, const W* v, int64_t D, int64_t row, int64_t count, float* o, int64_t width) {
  int64_t d = 0;
  for (; d + kTileColumns * kStep <= D; d += kTileColumns * kStep)
    weighted<R, kTileColumns>(begins, p, stride, v + d, row, count, o + d, width);
  for (; d + kStep <= D; d += kStep) weighted<R, 1>(begins, p, stride, v + d, row, count, o + d, width);
  for (size_t r = 0; d < D && r < R; r++) {
    Vector sum = begins ? Vector{} : load(o + r * width + d);
    for (int64_t j = 0; j < count; j++) sum = fma(all(p[r * stride + j]), load_part(at_row(v, j, row) + d, size_t(D - d)), sum);
    store(o + r * width + d, sum);
  }
}

// Calls task(std::integral_constant<size_t, rows>) for 1 .. kTileRows rows.
template <size_t R>
struct Size {
  static constexpr size_t value = R;
};

template <typename Task>
void with_rows(int64_t rows, const Task& task) {
  switch (rows) {
    case 1: return task(Size<1>());
    case 2: return task(Size<2>());
    case 3: return task(Size<3>());
#if defined(__AVX512F__) || defined(__aarch64__)
    case 4: return task(Size<4>());
    case 5: return task(Size<5>());
    case 6: return task(Size<6>());
#endif
  }
}

#undef UNROLL

}  // namespace QWEN_SET
}  // namespace qwen
