#include "../product.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <memory>

#include "vector.h"

namespace qwen {
namespace QWEN_SET {
namespace {

// A tile of the result is kRows x 4 accumulators; kRows vectors of x and one of w fit beside them into the registers.
constexpr size_t kColumns = 4, kRows = kRegisters == 32 ? 6 : 3;
// From so many rows on, the weight is converted once into a buffer in the L2 cache instead of once per group of rows.
constexpr size_t kManyRows = 4 * kRows;
constexpr size_t kPanelFloats = 128 << 10, kSumFloats = 48 << 10, kPartDepth = 1280;

size_t padded(size_t K) { return (K + kLanes - 1) / kLanes * kLanes; }

size_t group_begin(size_t group, size_t M) { return group * M / packed_groups(M); }

// Four rows of the weight, in place.
template <typename W>
struct Rows {
  const W* row[kColumns];
  size_t K;

  template <size_t R>
  void dot(const float* x, bool first, Four* out) const {
    Vector sum[kColumns][R] = {};
    const size_t whole = K / kLanes * kLanes;
    // The next four rows follow these. Asking for them line after line is what the hardware's own prefetcher would not do across rows.
    const char* ahead = reinterpret_cast<const char*>(row[0] + kColumns * K);
    size_t k = 0;
    for (; k < whole; k += kLanes, x += R * kLanes) {
      Vector in[R];
      for (size_t r = 0; r < R; r++) in[r] = load(x + r * kLanes);
      if (first)
        for (size_t line = 0; line < kColumns * kLanes * sizeof(W); line += 64, ahead += 64) __builtin_prefetch(ahead, 0, 3);
      for (size_t c = 0; c < kColumns; c++) {
        const Vector w = load(row[c] + k);
        for (size_t r = 0; r < R; r++) sum[c][r] += w * in[r];
      }
    }
    if (k < K)
      for (size_t c = 0; c < kColumns; c++) {
        const Vector w = load_part(row[c] + k, K - k);
        for (size_t r = 0; r < R; r++) sum[c][r] += w * load(x + r * kLanes);
      }
#pragma GCC unroll 8
    for (size_t r = 0; r < R; r++) out[r] = sums(sum[0][r], sum[1][r], sum[2][r], sum[3][r]);
  }
};

// Four rows of the weight in fp32, a vector of each in turn: `size` values of each from some k on.
struct Panel {
  const float* w;
  size_t size;
  Vector* partial;  // sums so far, where k has parts
  bool begins, ends;

  template <size_t R>
  void dot(const float* x, bool, Four* out) const {
    Vector sum[kColumns][R] = {};
    if (!begins)
#pragma GCC unroll 24
      for (size_t i = 0; i < kColumns * R; i++) sum[i / R][i % R] = partial[i];
    for (const float *at = w, *end = w + size * kColumns; at < end; at += kColumns * kLanes, x += R * kLanes) {
      Vector in[R];
      for (size_t r = 0; r < R; r++) in[r] = load(x + r * kLanes);
      for (size_t c = 0; c < kColumns; c++) {
        const Vector w = load(at + c * kLanes);
        for (size_t r = 0; r < R; r++) sum[c][r] += w * in[r];
      }
    }
    if (!ends)
#pragma GCC unroll 24
      for (size_t i = 0; i < kColumns * R; i++) partial[i] = sum[i / R][i % R];
    else
#pragma GCC unroll 8
      for (size_t r = 0; r < R; r++) out[r] = sums(sum[0][r], sum[1][r], sum[2][r], sum[3][r]);
  }
};

template <typename Weight>
void dot(const Weight& weight, const float* x, size_t rows, bool first, Four* out) {
  switch (rows) {
    case 1: return weight.template dot<1>(x, first, out);
    case 2: return weight.template dot<2>(x, first, out);
    case 3: return weight.template dot<3>(x, first, out);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 4: return weight.template dot<4>(x, first, out);
    case 5: return weight.template dot<5>(x, first, out);
    case 6: return weight.template dot<6>(x, first, out);
#endif
  }
}

// Columns n..n+3 of the rows begin..begin+rows-1 of y, from their products; `up` where the product is gated.
void finish(const Product& p, size_t begin, size_t rows, size_t n, const Four* products, const Four* up) {
  const size_t count = std::min(kColumns, p.N - n);
  for (size_t r = 0; r < rows; r++) {
    const size_t at = (begin + r) * p.N + n;
    Four value = products[r];
    if (p.gated) value = silu(value) * up[r];
    if (p.residual != nullptr) {
      Four residual = {};
      std::memcpy(&residual, p.residual + at, count * sizeof(float));
      value += residual;
    }
    std::memcpy(p.y + at, &value, count * sizeof(float));
  }
}

// Rows n..n+3 of a weight [N,K], the last one again where there are fewer.
template <typename W>
Rows<W> rows_at(const W* w, size_t n, size_t N, size_t K) {
  Rows<W> rows{{}, K};
  for (size_t c = 0; c < kColumns; c++) rows.row[c] = w + std::min(n + c, N - 1) * K;
  return rows;
}

template <typename W>
void few_rows(const Product& p, const W* w, size_t first, size_t last) {
  const size_t groups = packed_groups(p.M);
  for (size_t n = first; n < last; n += kColumns) {
    const auto weight = rows_at(w, n, p.N, p.K), up = p.gated ? rows_at(w + p.N * p.K, n, p.N, p.K) : weight;
    for (size_t group = 0; group < groups; group++) {
      const size_t begin = group_begin(group, p.M), rows = group_begin(group + 1, p.M) - begin;
      const float* x = p.x + begin * padded(p.K);
      Four products[kRows], ups[kRows];
      dot(weight, x, rows, group == 0, products);
      if (p.gated) dot(up, x, rows, group == 0, ups);
      finish(p, begin, rows, n, products, ups);
    }
  }
}

template <typename W>
void convert(const Rows<W>& rows, float* out) {
  size_t k = 0;
  for (; k + kLanes <= rows.K; k += kLanes)
    for (size_t c = 0; c < kColumns; c++, out += kLanes) store(out, load(rows.row[c] + k));
  if (k < rows.K)
    for (size_t c = 0; c < kColumns; c++, out += kLanes) store(out, load_part(rows.row[c] + k, rows.K - k));
}

// Memory that a thread keeps.
struct Buffer {
  float* at_least(size_t floats) {
    if (capacity < floats) memory.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
    if (floats > 0 && memory == nullptr) std::terminate();  // tasks cannot fail
    capacity = std::max(capacity, floats);
    return memory.get();
  }
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory;
  size_t capacity = 0;
};

// In the L2 cache: the weight's columns start..stop-1 as fp32, and the sums of some groups while k is read in parts that fit, with a group of
// rows, into the L1 cache.
template <typename W>
void many_rows(const Product& p, const W* w, size_t first, size_t last) {
  const size_t K = padded(p.K), tile = K * kColumns, sets = p.gated ? 2 : 1, groups = packed_groups(p.M);
  const size_t parts = (K + kPartDepth - 1) / kPartDepth, depth = padded((K + parts - 1) / parts);
  const size_t tiles = std::clamp<size_t>(kPanelFloats / (tile * sets), 1, (last - first + kColumns - 1) / kColumns);
  const size_t partial = kRows * kColumns * kLanes, batch = std::max<size_t>(1, kSumFloats / (tiles * sets * partial));
  thread_local Buffer panels, sums;
  float* panel = panels.at_least(tiles * sets * tile);
  float* open = sums.at_least(parts > 1 ? batch * tiles * sets * partial : 0);
  for (size_t start = first; start < last; start += tiles * kColumns) {
    const size_t stop = std::min(last, start + tiles * kColumns);
    float* to = panel;
    for (size_t n = start; n < stop; n += kColumns)
      for (size_t set = 0; set < sets; set++, to += tile) convert(rows_at(w + set * p.N * p.K, n, p.N, p.K), to);
    for (size_t low = 0; low < groups; low += batch)
      for (size_t k = 0; k < K; k += depth) {
        float* sum = open;
        for (size_t group = low; group < std::min(groups, low + batch); group++) {
          const size_t begin = group_begin(group, p.M), rows = group_begin(group + 1, p.M) - begin, size = std::min(depth, K - k);
          const float *x = p.x + begin * K + k * rows, *from = panel + k * kColumns;
          for (size_t n = start; n < stop; n += kColumns) {
            Four products[2][kRows];
            for (size_t set = 0; set < sets; set++, from += tile, sum += parts > 1 ? partial : 0)
              dot(Panel{from, size, reinterpret_cast<Vector*>(sum), k == 0, k + size == K}, x, rows, false, products[set]);
            if (k + size == K) finish(p, begin, rows, n, products[0], products[1]);
          }
        }
      }
  }
}

template <typename W>
void run(const Product& p, size_t first, size_t last) {
  const W* w = static_cast<const W*>(p.w);
  p.M < kManyRows ? few_rows(p, w, first, last) : many_rows(p, w, first, last);
}

}  // namespace

size_t packed_size(size_t M, size_t K) { return M * padded(K); }

size_t packed_groups(size_t M) { return (M + kRows - 1) / kRows; }

void pack_rows(const float* x, const float* norm, float eps, size_t M, size_t K, size_t first, size_t last, float* out) {
  for (size_t group = first; group < last; group++) {
    const size_t begin = group_begin(group, M), rows = group_begin(group + 1, M) - begin;
    for (size_t r = 0; r < rows; r++) {
      const float* row = x + (begin + r) * K;
      float scale = 1;
      if (norm != nullptr) {
        Vector squares[4] = {};
        size_t k = 0;
        for (; k + 4 * kLanes <= K; k += 4 * kLanes)
          for (size_t i = 0; i < 4; i++) squares[i] += load(row + k + i * kLanes) * load(row + k + i * kLanes);
        const Four parts = sums(squares[0], squares[1], squares[2], squares[3]);
        float sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
        for (; k < K; k++) sum += row[k] * row[k];
        scale = 1 / std::sqrt(sum / float(K) + eps);
      }
      float* to = out + begin * padded(K) + r * kLanes;
      for (size_t k = 0; k < K; k += kLanes, to += rows * kLanes) {
        Vector v = k + kLanes <= K ? load(row + k) : load_part(row + k, K - k);
        if (norm != nullptr) v = v * scale * (k + kLanes <= K ? load(norm + k) : load_part(norm + k, K - k));
        store(to, v);
      }
    }
  }
}

void product(const Product& p, size_t first, size_t last) {
  p.bf16 ? run<Bf16>(p, first, last) : run<float>(p, first, last);
}

}  // namespace QWEN_SET
}  // namespace qwen
