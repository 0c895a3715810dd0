// Products of many rows in tiles of bf16 (bf16_tiles.h) behind one face, for the ops.
#pragma once

#include <algorithm>
#include <cstring>

#include "bf16_tiles.h"
#include "call.h"
#include "thread_memory.h"

namespace qwen {

// Fewer rows do not pay for bringing a matrix into tiles.
inline bool in_bf16_tiles(int64_t M) {
  constexpr int64_t kFewest = 32;
  return M >= kFewest && has_bf16_tiles();
}

// x [M,K], normalized where norm [K] is given, as rows of tiles.
struct Bf16Rows {
  Bf16Rows(const Call& call, const float* x, const float* norm, float epsilon, int64_t M, int64_t K) : M(M), K(K) {
    static const auto prepare = QWEN_TILES(bf16_rows);
    static thread_local ThreadMemory memory;
    codes_ = memory.at_least(size_t(count()) * bf16_bytes(K));
    call.parallel(size_t(count()), [&](size_t t) {
      static thread_local ThreadMemory scratch;
      const int64_t first = int64_t(t) * kBf16Lines;
      prepare(x + first * K, norm, epsilon, int(std::min<int64_t>(kBf16Lines, M - first)), K,
              reinterpret_cast<float*>(scratch.at_least(sizeof(float) * size_t(K))), reinterpret_cast<uint16_t*>(codes_ + t * bf16_bytes(K)));
    });
  }

  int64_t count() const { return (M + kBf16Lines - 1) / kBf16Lines; }
  const uint16_t* tile(int64_t t) const { return reinterpret_cast<const uint16_t*>(codes_ + size_t(t) * bf16_bytes(K)); }

  const int64_t M, K;

 private:
  char* codes_ = nullptr;
};

// All products of the rows with SETS parts of a matrix, `panels` times 16 columns each. open(panel, set, columns) brings a panel of a part into
// tiles; done(panel, first row, rows, results of the first and of the last part [16,16]) takes what comes out.
template <int SETS, typename Open, typename Done>
void over_bf16_tiles(const Call& call, const Bf16Rows& x, int64_t panels, const Open& open, const Done& done) {
  constexpr int64_t kStep = kBf16AtOnce / SETS, kPanelsOfTask = 16, kTasks = 64, kRowBytes = 1 << 20, kMostTiles = 16, kPartsAtOnce = 8;
  const int64_t count = x.count(), bytes = int64_t(bf16_bytes(x.K));
  const int64_t together = std::clamp<int64_t>(kRowBytes / bytes / kBf16AtOnce, 1, kMostTiles / kBf16AtOnce) * kBf16AtOnce, parts = (count + together - 1) / together;
  const int64_t group = std::clamp<int64_t>(panels * parts / kTasks / kStep, 1, kPanelsOfTask / kStep) * kStep;
  call.parallel(size_t((panels + group - 1) / group * parts), [&](size_t index) {
    static const auto begin_tiles = QWEN_TILES(bf16_begin), end_tiles = QWEN_TILES(bf16_end);
    static const auto multiply = QWEN_TILES(bf16_product);
    static thread_local ThreadMemory memory;
    uint16_t* const columns = reinterpret_cast<uint16_t*>(memory.at_least(size_t(kBf16AtOnce * bytes)));
    static thread_local ThreadMemory sums;
    float* const results = reinterpret_cast<float*>(sums.at_least(sizeof(float) * size_t((together + 1) * kBf16AtOnce * kBf16Lines * kBf16Lines)));
    const auto column = [&](int64_t i) { return columns + i * bytes / int64_t(sizeof(uint16_t)); };
    const int64_t begin = int64_t(index) / parts * group, end = std::min(panels, begin + group);
    const int64_t first = int64_t(index) % parts * together, last = std::min(count, first + together);
    begin_tiles();
    for (int64_t panel = begin; panel < end; panel += kStep) {
      const int64_t here = std::min(kStep, end - panel);
      for (int64_t i = 0; i < here; i++)
        for (int set = 0; set < SETS; set++) open(panel + i, set, column(i * SETS + set));
      // A part of the columns stays in the first cache while rows go by.
      for (int64_t part = 0; part < bf16_parts(x.K); part += kPartsAtOnce)
        for (int64_t t = first; t < last; t += kBf16AtOnce) {
          Bf16Product product;
          product.rows = int(std::min<int64_t>(kBf16AtOnce, last - t)), product.columns = int(here * SETS);
          for (int r = 0; r < product.rows; r++) product.row[r] = x.tile(t + r);
          for (int c = 0; c < product.columns; c++) product.column[c] = column(c);
          product.first = part, product.last = std::min(bf16_parts(x.K), part + kPartsAtOnce);
          product.out = results + (t - first) * kBf16AtOnce * kBf16Lines * kBf16Lines;
          multiply(product);
          if (product.last < bf16_parts(x.K)) continue;
          for (int r = 0; r < product.rows; r++)
            for (int i = 0; i < int(here); i++) {
              const int64_t row = (t + r) * kBf16Lines;
              done(panel + i, row, int(std::min<int64_t>(kBf16Lines, x.M - row)), product.at(r, i * SETS), product.at(r, i * SETS + SETS - 1));
            }
        }
    }
    end_tiles();
  });
}

// `rows` rows of results [16,16], with the residual where there is one, into y [.,N] from column n on.
inline void write_results(const float* results, int rows, const float* residual, float* y, int64_t row, int64_t n, int64_t N) {
  const int64_t count = std::min<int64_t>(kBf16Lines, N - n);
  for (int m = 0; m < rows; m++) {
    const int64_t at = (row + m) * N + n;
    const float* values = results + m * kBf16Lines;
    if (residual != nullptr && count == kBf16Lines)
      for (int64_t i = 0; i < kBf16Lines; i++) y[at + i] = values[i] + residual[at + i];
    else if (residual != nullptr)
      for (int64_t i = 0; i < count; i++) y[at + i] = values[i] + residual[at + i];
    else if (count == kBf16Lines)
      std::memcpy(y + at, values, sizeof(float) * kBf16Lines);
    else
      std::memcpy(y + at, values, sizeof(float) * size_t(count));
  }
}

}  // namespace qwen
