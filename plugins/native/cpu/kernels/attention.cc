// Attention of some query rows over blocks of the cache.

#include "../attention.h"

#include <cfloat>

#include "attention_tiles.h"
#include "cache_rows.h"

namespace qwen::QWEN_SET {
namespace {

// Cache rows that are read for all queries of a task before the next ones: with their queries they stay in the L2 cache.
constexpr int64_t kRowsAtOnce = 64;

// y = norm(x) * weight, its first 2 * half values turned; y may be x.
void norm_and_turn(const float* x, const float* weight, int64_t D, const float* cos, const float* sin, int64_t half, float scale,
                   float epsilon, float* y) {
  Vector squares = {};
  int64_t d = 0;
  for (; d + kStep <= D; d += kStep) squares = fma(load(x + d), load(x + d), squares);
  if (d < D) {
    const Vector rest = load_part(x + d, size_t(D - d));
    squares = fma(rest, rest, squares);
  }
  const float factor = scale / sqrtf(sum(squares) / float(D) + epsilon);
  for (d = 0; d + kStep <= D; d += kStep) store(y + d, load(x + d) * all(factor) * load(weight + d));
  for (; d < D; d++) y[d] = x[d] * factor * weight[d];
  int64_t i = 0;
  for (; i + kStep <= half; i += kStep) {
    const Vector first = load(y + i), second = load(y + half + i), c = load(cos + i), s = load(sin + i);
    store(y + i, fma(first, c, -(second * s)));
    store(y + half + i, fma(second, c, first * s));
  }
  if (i < half) {
    const size_t n = size_t(half - i);
    const Vector first = load_part(y + i, n), second = load_part(y + half + i, n), c = load_part(cos + i, n), s = load_part(sin + i, n);
    store_part(y + i, fma(first, c, -(second * s)), n);
    store_part(y + half + i, fma(second, c, first * s), n);
  }
}

// The queries of a task times the scale, packed in tiles of kTileRows rows.
void load_queries(const Attention& a, const Queries& queries, float* to) {
  const int64_t G = a.group(), width = a.width(), rows = queries.rows(a);
  float* const turned = to + rows * width;  // scores go there later
  for (int64_t row = 0; row < rows; row++) {
    const int64_t t = queries.first + row / G, slot = a.length[queries.b] + t;
    const float* const x = a.q + ((queries.b * a.T + t) * a.Hq + queries.head * G + row % G) * a.D;
    const float *cos = a.cos + queries.b * a.table + slot * a.half, *sin = a.sin + queries.b * a.table + slot * a.half;
    norm_and_turn(x, a.q_norm, a.D, cos, sin, a.half, a.scale, a.epsilon, turned);
    std::memset(turned + a.D, 0, size_t(width - a.D) * sizeof(float));
    const int64_t tile = row / kTileRows * kTileRows, size = std::min(kTileRows, rows - tile);
    for (int64_t d = 0; d < width; d += kStep) store(packed(to + tile * width, size, row - tile, d), load(turned + d));
  }
}

// Scores p [kCacheBlock] of a row, of which it sees `seen`, become weights; those up to `count` are 0 behind them.
void weigh(float* p, int64_t seen, int64_t count, float* most, float* total) {
  Vector top = all(-FLT_MAX);
  int64_t j = 0;
  for (; j + kStep <= seen; j += kStep) {
    const Vector s = load(p + j);
    top = s > top ? s : top;
  }
  float lanes[kLanes];
  store(lanes, top);
  float largest = -FLT_MAX;
  for (size_t i = 0; i < kLanes; i++) largest = lanes[i] > largest ? lanes[i] : largest;
  for (; j < seen; j++) largest = p[j] > largest ? p[j] : largest;
  Vector weights = {};
  for (j = 0; j + kStep <= seen; j += kStep) {
    const Vector w = exponentials(load(p + j) - all(largest));
    weights = weights + w;
    store(p + j, w);
  }
  if (j < seen) {
    float part[kLanes] = {};
    store(part, exponentials(load_part(p + j, size_t(seen - j)) - all(largest)));
    for (size_t i = size_t(seen - j); i < kLanes; i++) part[i] = 0;
    weights = weights + load(part);
    store(p + j, load(part));
    j += kStep;
  }
  for (; j < count; j++) p[j] = 0;
  *most = largest, *total = sum(weights);
}

// One block of the cache for all rows, into `to`; rows that see none of it are left out. W is what the cache keeps of a value.
template <typename W>
void attend_rows(const Attention& a, const Queries& queries, int64_t block, const float* q, float* p, const Partial& to) {
  const int64_t G = a.group(), width = a.width(), rows = queries.rows(a), D = a.D, start = block * kCacheBlock;
  const int64_t before = a.length[queries.b] + queries.first - start;  // of this block, what the first token sees beside itself
  const auto seen = [&](int64_t row) { return std::clamp<int64_t>(before + row / G + 1, 0, kCacheBlock); };
  const int64_t end = seen(rows - 1);
  const int64_t bytes = a.row(), at_block = ((queries.b * a.Hkv + queries.head) * a.S + start) * bytes;
  const W* const keys = reinterpret_cast<const W*>(a.k_cache + at_block);
  const W* const values = reinterpret_cast<const W*>(a.v_cache + at_block);
  const RowScales<W> key_scales(keys, D, bytes, end), value_scales(values, D, bytes, end);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t low = 0; low < end; low += kRowsAtOnce)
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t row = tile * kTileRows, size = std::min(kTileRows, rows - row), high = std::min(low + kRowsAtOnce, seen(row + size - 1));
      with_rows(size, [&](auto R) {
        for (int64_t j = low; j < high; j += kTileColumns) {
          const W* k[kTileColumns];
          for (int64_t c = 0; c < kTileColumns; c++) k[c] = at_row(keys, std::min(j + c, end - 1), bytes);
          float* const at = p + row * kCacheBlock + j;
          // The keys that follow and the values of these: by the first tile, or a quarter by each of the first four.
          const int64_t one = tiles < kTileColumns ? j : low + tile * (kRowsAtOnce / kTileColumns) + (j - low) / kTileColumns;
          const W* const next[] = {at_row(keys, kRowsAtOnce + one, bytes), at_row(values, one, bytes)};
          if (tile == 0 && tiles < kTileColumns)
            scores<R.value, kTileColumns>(q + row * width, k, D, bytes, at, kCacheBlock, next);
          else if (tile < kTileColumns && tiles >= kTileColumns)
            scores<R.value, 1>(q + row * width, k, D, bytes, at, kCacheBlock, next);
          else
            scores<R.value, 0>(q + row * width, k, D, bytes, at, kCacheBlock, next);
        }
      });
    }
  for (int64_t row = 0; row < rows; row++)
    if (seen(row) > 0) {
      key_scales.apply(p + row * kCacheBlock);
      weigh(p + row * kCacheBlock, seen(row), end, to.most + row, to.sum + row);
      value_scales.apply(p + row * kCacheBlock);
    }
  for (int64_t low = 0; low < end; low += kRowsAtOnce)
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t size = std::min(kTileRows, rows - row), count = std::min(kRowsAtOnce, seen(row + size - 1) - low);
      if (count <= 0) continue;
      for (int64_t r = row; r < row + size && seen(r) == 0; r++) std::memset(p + r * kCacheBlock, 0, kCacheBlock * sizeof(float));
      with_rows(size, [&](auto R) {
        weighted_rows<R.value>(low == 0, p + row * kCacheBlock + low, kCacheBlock, at_row(values, low, bytes), D, bytes, count,
                               to.o + row * width, width);
      });
    }
}

void attend(const Attention& a, const Queries& queries, int64_t block, const float* q, float* p, const Partial& to) {
  switch (a.format) {
    case CacheFormat::kFp32: return attend_rows<float>(a, queries, block, q, p, to);
    case CacheFormat::kFp16: return attend_rows<Half>(a, queries, block, q, p, to);
    case CacheFormat::kInt8: return attend_rows<Code8>(a, queries, block, q, p, to);
    case CacheFormat::kFp8: return attend_rows<E4m3>(a, queries, block, q, p, to);
  }
}

// Takes block `from` into `total`, for the rows that see some of it.
void merge(const Attention& a, const Queries& queries, int64_t block, const Partial& from, const Partial& total) {
  const int64_t G = a.group(), width = a.width(), rows = queries.rows(a);
  const int64_t hidden = block * kCacheBlock - a.length[queries.b] - queries.first;  // tokens that see nothing of it
  for (int64_t row = std::max<int64_t>(0, hidden) * G; row < rows; row++) {
    const float most = std::max(total.most[row], from.most[row]);
    const Vector both = exponentials(Vector{total.most[row] - most, from.most[row] - most});
    const Vector kept = all(both[0]), added = all(both[1]);
    total.sum[row] = fma(all(from.sum[row]), added, all(total.sum[row]) * kept)[0];
    total.most[row] = most;
    float *o = total.o + row * width, *more = from.o + row * width;
    for (int64_t d = 0; d < width; d += kStep) store(o + d, fma(load(more + d), added, load(o + d) * kept));
  }
}

void finish(const Attention& a, const Queries& queries, const Partial& total) {
  const int64_t G = a.group(), width = a.width();
  for (int64_t row = 0; row < queries.rows(a); row++) {
    const int64_t t = queries.first + row / G, at = ((queries.b * a.T + t) * a.Hq + queries.head * G + row % G) * a.D;
    const float* const o = total.o + row * width;
    const Vector part = all(1 / total.sum[row]), one = all(1.0f);
    int64_t d = 0;
    for (; d + kStep <= a.D; d += kStep)
      store(a.y + at + d, load(o + d) * part / (one + exponentials(-load(a.gate + at + d))));
    if (d < a.D) {
      const size_t rest = size_t(a.D - d);
      store_part(a.y + at + d, load(o + d) * part / (one + exponentials(-load_part(a.gate + at + d, rest))), rest);
    }
  }
}

}  // namespace

void attention_write(const Attention& a, int64_t b, int64_t t, int64_t head, float* scratch) {
  const int64_t slot = a.length[b] + t, from = ((b * a.T + t) * a.Hkv + head) * a.D, to = ((b * a.Hkv + head) * a.S + slot) * a.row();
  const float *cos = a.cos + b * a.table + slot * a.half, *sin = a.sin + b * a.table + slot * a.half;
  norm_and_turn(a.k + from, a.k_norm, a.D, cos, sin, a.half, 1.0f, a.epsilon, scratch);
  write_row(a.format, scratch, a.D, a.k_cache + to);
  write_row(a.format, a.v + from, a.D, a.v_cache + to);
}

void attention_rows(const Attention& a, const Queries& queries, float* scratch) {
  const int64_t rows = queries.rows(a), width = a.width(), blocks = queries.blocks(a);
  float *q = scratch, *p = q + rows * width, *memory = p + rows * kCacheBlock;
  const Partial total = Partial::at(memory, rows, width);
  const Partial part = Partial::at(memory + Partial::floats(rows, width), rows, width);
  load_queries(a, queries, q);
  attend(a, queries, 0, q, p, total);
  for (int64_t block = 1; block < blocks; block++) {
    attend(a, queries, block, q, p, part);
    merge(a, queries, block, part, total);
  }
  finish(a, queries, total);
}

void attention_block(const Attention& a, const Queries& queries, int64_t block, const Partial& to, float* scratch) {
  load_queries(a, queries, scratch);
  attend(a, queries, block, scratch, scratch + queries.rows(a) * a.width(), to);
}

void attention_merge(const Attention& a, const Queries& queries, float* blocks) {
  const int64_t rows = queries.rows(a), width = a.width(), count = queries.blocks(a);
  const Partial total = Partial::at(blocks, rows, width);
  for (int64_t block = 1; block < count; block++)
    merge(a, queries, block, Partial::at(blocks + size_t(block) * Partial::floats(rows, width), rows, width), total);
  finish(a, queries, total);
}

}  // namespace qwen::QWEN_SET
