// Causal attention of new tokens over a cache, between the projections of a gated attention mixer; graphs/ops/gated_attention_op.py has the
// equations.
//
// Cache rows are taken in blocks that begin at multiples of kCacheBlock. A query has scores, softmax and weighted sum within each block, and
// then merges the blocks in their order. All sums have one order, so a token has the same bits whatever else a call reads, and however
// the work is split: blocks may be done by different tasks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace qwen {

constexpr int64_t kCacheBlock = 256;
constexpr int64_t kQueryRows = 48;  // query rows (tokens times heads of a group) that share a pass over the cache
constexpr int64_t kRowStep = 16;    // rows of scratch are padded with zeros to multiples of this

// What a cache keeps of a value (qwen_export/cache_formats.py). Rows of kInt8 end with kScaleBytes, of which the first four are the fp32
// factor of the row's codes.
enum class CacheFormat { kFp32, kFp16, kInt8, kFp8 };
constexpr int64_t kScaleBytes = 16;

// Bytes of a row of D values.
constexpr int64_t cache_row(CacheFormat format, int64_t D) {
  return format == CacheFormat::kFp32   ? 4 * D
         : format == CacheFormat::kFp16 ? 2 * D
         : format == CacheFormat::kInt8 ? D + kScaleBytes
                                        : D;
}

// One call. Everything but the caches is fp32, everything is contiguous. The caches are written in place.
struct Attention {
  int64_t B, T, Hq, Hkv, D, S, half;  // half: R/2, pairs of values that turn
  const float *q, *k, *v, *gate;      // [B,T,Hq*D]  [B,T,Hkv*D]  [B,T,Hkv*D]  [B,T,Hq*D]
  const float *q_norm, *k_norm;       // [D]
  const float *cos, *sin;             // [S',half], sequence b's at b * table
  int64_t table;
  const int64_t* length;   // [B]
  CacheFormat format;
  unsigned char *k_cache, *v_cache;  // [B,Hkv,S] rows
  float* y;                          // [B,T,Hq*D]
  float scale, epsilon;

  int64_t row() const { return cache_row(format, D); }
  int64_t group() const { return Hq / Hkv; }
  int64_t width() const { return (D + kRowStep - 1) / kRowStep * kRowStep; }
  int64_t tokens() const { return std::max<int64_t>(1, kQueryRows / group()); }  // of one task
  int64_t parts() const { return (T + tokens() - 1) / tokens(); }                // of the tokens of a sequence
  int64_t most_rows() const { return std::min(tokens(), T) * group(); }
};

// Query rows of one key head: tokens first .. last-1 of sequence b. Row (t - first) * group + g is head g of the group.
struct Queries {
  int64_t b, head, first, last;

  int64_t rows(const Attention& a) const { return (last - first) * a.group(); }
  // Cache blocks that the last token sees.
  int64_t blocks(const Attention& a) const { return (a.length[b] + last - 1) / kCacheBlock + 1; }
};

// What rows have of one block, or of all blocks so far: the largest score, the sum of weights, and the weighted sum of values.
struct Partial {
  float *most, *sum;  // [rows]
  float* o;           // [rows,width]

  static size_t floats(int64_t rows, int64_t width) { return size_t(2 * padded(rows) + rows * width); }
  static Partial at(float* memory, int64_t rows, int64_t width) {
    return {memory, memory + padded(rows), memory + 2 * padded(rows)};
  }

 private:
  static int64_t padded(int64_t rows) { return (rows + kRowStep - 1) / kRowStep * kRowStep; }
};

// Floats of scratch that a task needs. Its start is aligned to 64 bytes.
inline size_t attention_scratch(const Attention& a) {
  const int64_t rows = a.most_rows();
  return size_t(rows * (a.width() + kCacheBlock)) + 2 * Partial::floats(rows, a.width());
}

#define QWEN_ATTENTION(SET)                                                                                        \
  namespace SET {                                                                                                  \
  /* Keys, normalized and turned, and values of token t of sequence b into the caches, for one key head. Scratch    \
     of D floats. */                                                                                               \
  void attention_write(const Attention& a, int64_t b, int64_t t, int64_t head, float* scratch);                    \
  /* All blocks of some queries, and their y. */                                                                   \
  void attention_rows(const Attention& a, const Queries& queries, float* scratch);                                 \
  /* One block of some queries. */                                                                                 \
  void attention_block(const Attention& a, const Queries& queries, int64_t block, const Partial& to, float* scratch); \
  /* y of some queries from their blocks, which lie one after the other in memory. */                              \
  void attention_merge(const Attention& a, const Queries& queries, float* blocks);                                 \
  }
QWEN_SETS(QWEN_ATTENTION)
#undef QWEN_ATTENTION

}  // namespace qwen
