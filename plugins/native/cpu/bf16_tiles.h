// Products of many rows in tiles of bf16: an option (has_bf16_tiles), because activations are rounded to bf16; weights are bf16 already.
//
// 16 rows of activations and 16 columns of a product (rows of the weight) are cut along K into tiles of 32 values, and K is filled up with
// zeros:
//
//   rows     [K / 32][16][32] bf16
//   columns  [K / 32][16][16][2] bf16: two values of each column, then the next two
//
// A tile adds its 32 products to sums in fp32: first those of the even and those of the odd k, each in order, then the two to the sum. So a
// row has the same bits whatever other rows are in the call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace qwen {

constexpr int kBf16Depth = 32, kBf16Lines = 16;  // values of k of a tile; rows or columns
constexpr int kBf16AtOnce = 2;                   // of both, in the registers

inline int64_t bf16_parts(int64_t K) { return (K + kBf16Depth - 1) / kBf16Depth; }
// Of 16 rows, or of 16 columns.
inline size_t bf16_bytes(int64_t K) { return size_t(bf16_parts(K)) * kBf16Lines * kBf16Depth * sizeof(uint16_t); }

// Some rows by some columns, one or two times 16 of each, over parts first .. last - 1 of K. Sums go on from those in `out` where first > 0.
struct Bf16Product {
  int rows = 0, columns = 0;
  const uint16_t *row[kBf16AtOnce] = {}, *column[kBf16AtOnce] = {};
  int64_t first = 0, last = 0;
  float* out = nullptr;  // [rows, columns, 16, 16]

  float* at(int r, int c) const { return out + (r * columns + c) * kBf16Lines * kBf16Lines; }
};

// bf16_rows: up to 16 rows x [count, K], first divided by sqrt(mean(x^2) + epsilon) and multiplied by norm [K] where that is given. `scratch`: K.
// bf16_columns: up to 16 rows of a weight [count, K] in bf16.
// bf16_begin, bf16_end: around the products of a thread.
#define QWEN_BF16_TILES(SET)                                                                                                           \
  namespace SET {                                                                                                                      \
  void bf16_rows(const float* x, const float* norm, float epsilon, int count, int64_t K, float* scratch, uint16_t* out);               \
  void bf16_columns(const uint16_t* w, int count, int64_t K, uint16_t* out);                                                           \
  void bf16_begin();                                                                                                                   \
  void bf16_product(const Bf16Product& product);                                                                                       \
  void bf16_end();                                                                                                                     \
  }
QWEN_TILE_SETS(QWEN_BF16_TILES)
#undef QWEN_BF16_TILES

}  // namespace qwen
