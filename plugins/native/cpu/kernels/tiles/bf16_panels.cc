// Products in tiles of bf16 (bf16_tiles.h).

#include <algorithm>
#include <cstring>

#include "../../bf16_tiles.h"
#include "../normalize_row.h"
#include "tile_registers.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace qwen::QWEN_SET {
namespace {

constexpr int64_t kTileValues = kBf16Lines * kBf16Depth;

// To nearest, ties to even.
inline uint16_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // NaN stays
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// 32 values of a row.
inline void round_part(const float* x, uint16_t* out) {
#if defined(__AVX512BF16__)
  const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
  std::memcpy(out, &both, sizeof(both));
#else
  for (int k = 0; k < kBf16Depth; k++) out[k] = rounded(x[k]);
#endif
}

// 16 rows of 16 pairs become 16 pairs of 16 columns.
inline void transpose(const uint32_t* const* from, int64_t at, uint16_t* out) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from[i] + at);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++)
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]), a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
  // a[4 g + c] has column c of each quarter, of rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    const __m512i low0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), high0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i low1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88), high1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_si512(out + 32 * c, _mm512_shuffle_i32x4(low0, low1, 0x88));
    _mm512_storeu_si512(out + 32 * (c + 8), _mm512_shuffle_i32x4(low0, low1, 0xdd));
    _mm512_storeu_si512(out + 32 * (c + 4), _mm512_shuffle_i32x4(high0, high1, 0x88));
    _mm512_storeu_si512(out + 32 * (c + 12), _mm512_shuffle_i32x4(high0, high1, 0xdd));
  }
#else
  for (int pair = 0; pair < 16; pair++)
    for (int column = 0; column < 16; column++) std::memcpy(out + 32 * pair + 2 * column, from[column] + at + pair, 4);
#endif
}

template <int T>
void begin_sum(const Bf16Product& p, int r, int c) {
  if (p.first == 0)
    tile_zero<T>();
  else
    tile_load<T>(p.at(r, c), kTileBytes);
}

template <int ROWS, int COLUMNS>
void product(const Bf16Product& p) {
  begin_sum<0>(p, 0, 0);
  if constexpr (COLUMNS == 2) begin_sum<1>(p, 0, 1);
  if constexpr (ROWS == 2) begin_sum<2>(p, 1, 0);
  if constexpr (ROWS == 2 && COLUMNS == 2) begin_sum<3>(p, 1, 1);
  for (int64_t part = p.first; part < p.last; part++) {
    const int64_t at = part * kTileValues;
    tile_load<4>(p.row[0] + at, kTileBytes);
    tile_load<6>(p.column[0] + at, kTileBytes);
    tile_dot_bf16<0, 4, 6>();
    if constexpr (COLUMNS == 2) {
      tile_load<7>(p.column[1] + at, kTileBytes);
      tile_dot_bf16<1, 4, 7>();
    }
    if constexpr (ROWS == 2) {
      tile_load<5>(p.row[1] + at, kTileBytes);
      tile_dot_bf16<2, 5, 6>();
      if constexpr (COLUMNS == 2) tile_dot_bf16<3, 5, 7>();
    }
  }
  tile_store<0>(p.at(0, 0), kTileBytes);
  if constexpr (COLUMNS == 2) tile_store<1>(p.at(0, 1), kTileBytes);
  if constexpr (ROWS == 2) tile_store<2>(p.at(1, 0), kTileBytes);
  if constexpr (ROWS == 2 && COLUMNS == 2) tile_store<3>(p.at(1, 1), kTileBytes);
}

}  // namespace

void bf16_rows(const float* x, const float* norm, float epsilon, int count, int64_t K, float* scratch, uint16_t* out) {
  if (count < kBf16Lines) std::memset(out, 0, bf16_bytes(K));
  const int64_t whole = K / kBf16Depth * kBf16Depth;
  for (int m = 0; m < count; m++, x += K) {
    const float* values = x;
    if (norm != nullptr) {
      normalize_row(x, norm, epsilon, K, scratch);
      values = scratch;
    }
    uint16_t* to = out + m * kBf16Depth;
    for (int64_t k = 0; k < whole; k += kBf16Depth, to += kTileValues) round_part(values + k, to);
    if (whole < K) {
      float rest[kBf16Depth] = {};
      std::memcpy(rest, values + whole, size_t(K - whole) * sizeof(float));
      round_part(rest, to);
    }
  }
}

void bf16_columns(const uint16_t* w, int count, int64_t K, uint16_t* out) {
  const int64_t whole = K / kBf16Depth * kBf16Depth;
  const uint32_t* rows[kBf16Lines];
  for (int n = 0; n < kBf16Lines; n++) rows[n] = reinterpret_cast<const uint32_t*>(w + std::min(n, count - 1) * K);
  for (int64_t k = 0; k < whole; k += kBf16Depth, out += kTileValues) {
    for (const uint32_t* row : rows) __builtin_prefetch(row + kBf16Lines * K / 2 + k / 2, 0, 2);  // of memory: the next 16
    transpose(rows, k / 2, out);
  }
  if (whole == K) return;
  uint16_t rest[kBf16Lines][kBf16Depth] = {};
  for (int n = 0; n < kBf16Lines; n++) {
    std::memcpy(rest[n], reinterpret_cast<const uint16_t*>(rows[n]) + whole, size_t(K - whole) * sizeof(uint16_t));
    rows[n] = reinterpret_cast<const uint32_t*>(rest[n]);
  }
  transpose(rows, 0, out);
}

void bf16_begin() {
  TileShapes shapes;
  for (int tile = 0; tile < 8; tile++) shapes.set(tile, kBf16Lines, kTileBytes);
  tiles_begin(shapes);
}

void bf16_product(const Bf16Product& p) {
  (p.rows == 1 ? (p.columns == 1 ? product<1, 1> : product<1, 2>) : (p.columns == 1 ? product<2, 1> : product<2, 2>))(p);
}

void bf16_end() { tiles_end(); }

}  // namespace qwen::QWEN_SET
