#include "../product.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "vector.h"

namespace qwen {
namespace QWEN_SET {
namespace {

// A tile of the result is kRows x 4 accumulators; kRows vectors of x and one of w fit beside them into the registers.
constexpr size_t kColumns = 4, kRows = kRegisters == 32 ? 6 : 3;
// From so many rows on, the weight is converted once into a buffer in the L2 cache instead of once per group of rows.
constexpr size_t kManyRows = 4 * kRows;
constexpr size_t kPanelBytes = 256 << 10;

size_t padded(size_t K) { return (K + kLanes - 1) / kLanes * kLanes; }

size_t group_begin(size_t group, size_t M) { return group * M / packed_groups(M); }

// Four rows of the weight, where they lie.
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
    for (size_t r = 0; r < R; r++) out[r] = sums(sum[0][r], sum[1][r], sum[2][r], sum[3][r]);
  }
};

// Four rows of the weight in fp32, a vector of each in turn.
struct Panel {
  const float* w;
  size_t K;

  template <size_t R>
  void dot(const float* x, bool, Four* out) const {
    Vector sum[kColumns][R] = {};
    const float *at = w, *end = w + padded(K) * kColumns;
    for (; at < end; at += kColumns * kLanes, x += R * kLanes) {
      Vector in[R];
      for (size_t r = 0; r < R; r++) in[r] = load(x + r * kLanes);
      for (size_t c = 0; c < kColumns; c++) {
        const Vector w = load(at + c * kLanes);
        for (size_t r = 0; r < R; r++) sum[c][r] += w * in[r];
      }
    }
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

// Columns n..n+3 of the rows of one group.
template <typename Weight>
void tile(const Product& p, const Weight& weight, const Weight& up, size_t group, size_t n) {
  Four values[kRows], ups[kRows];
  const size_t begin = group_begin(group, p.M), rows = group_begin(group + 1, p.M) - begin, count = std::min(kColumns, p.N - n);
  const float* x = p.x + begin * padded(p.K);
  dot(weight, x, rows, group == 0, values);
  if (p.gated) {
    dot(up, x, rows, group == 0, ups);
    for (size_t r = 0; r < rows; r++) values[r] = silu(values[r]) * ups[r];
  }
  for (size_t r = 0; r < rows; r++) {
    const size_t at = (begin + r) * p.N + n;
    if (p.residual != nullptr) {
      Four residual = {};
      std::memcpy(&residual, p.residual + at, count * sizeof(float));
      values[r] += residual;
    }
    std::memcpy(p.y + at, &values[r], count * sizeof(float));
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
    for (size_t group = 0; group < groups; group++) tile(p, weight, up, group, n);
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

template <typename W>
void many_rows(const Product& p, const W* w, size_t first, size_t last) {
  const size_t tile_size = padded(p.K) * kColumns, halves = p.gated ? 2 : 1;
  const size_t tiles = std::max<size_t>(1, kPanelBytes / (tile_size * sizeof(float) * halves));
  thread_local std::unique_ptr<float[]> panel;
  thread_local size_t capacity = 0;
  if (capacity < tiles * tile_size * halves) panel.reset(new float[capacity = tiles * tile_size * halves]);
  const size_t groups = packed_groups(p.M);
  for (size_t start = first; start < last; start += tiles * kColumns) {
    const size_t stop = std::min(last, start + tiles * kColumns);
    float* at = panel.get();
    for (size_t n = start; n < stop; n += kColumns)
      for (size_t half = 0; half < halves; half++, at += tile_size) convert(rows_at(w + half * p.N * p.K, n, p.N, p.K), at);
    for (size_t group = 0; group < groups; group++) {
      const float* from = panel.get();
      for (size_t n = start; n < stop; n += kColumns, from += halves * tile_size)
        tile(p, Panel{from, p.K}, Panel{from + (halves - 1) * tile_size, p.K}, group, n);
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
