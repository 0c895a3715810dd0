// Two passes: the largest entry of each block, which gives a bound that at least K entries reach, then the blocks that reach it, few of them.
#include "top_logits.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace qwen::QWEN_SET {

namespace {

constexpr size_t kBlock = 256, kLanes = 32;

// The largest entry, infinity if one is not a number. n is a multiple of kLanes, or the end of the row.
inline float largest(const float* x, size_t n) {
  float lanes[kLanes];
  int lost = 0;
  for (size_t j = 0; j < kLanes; j++) lanes[j] = -INFINITY;
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (size_t j = 0; j < kLanes; j++) {
      lost |= x[i + j] != x[i + j];
      lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    }
  for (; i < n; i++) {
    lost |= x[i] != x[i];
    lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
  }
  return lost ? INFINITY : *std::max_element(lanes, lanes + kLanes);
}

}  // namespace

size_t top_logits(const float* x, size_t n, int32_t first, size_t K, Entry* found) {
  const size_t blocks = (n + kBlock - 1) / kBlock;
  static thread_local std::vector<float> maxima, sorted;
  static thread_local std::vector<Entry> reached;
  maxima.resize(blocks);
  for (size_t b = 0; b < blocks; b++) maxima[b] = largest(x + b * kBlock, std::min(kBlock, n - b * kBlock));
  float bound = -INFINITY;
  if (blocks >= K) {
    sorted = maxima;
    std::nth_element(sorted.begin(), sorted.begin() + (K - 1), sorted.end(), std::greater<float>());
    bound = sorted[K - 1];
  }
  reached.clear();
  for (size_t b = 0; b < blocks; b++) {
    if (maxima[b] < bound) continue;
    for (size_t i = b * kBlock; i < std::min(n, (b + 1) * kBlock); i++)
      if (!(x[i] < bound)) reached.push_back({x[i], first + static_cast<int32_t>(i)});
  }
  const size_t count = std::min(K, reached.size());
  std::partial_sort_copy(reached.begin(), reached.end(), found, found + count, before);
  return count;
}

}  // namespace qwen::QWEN_SET
