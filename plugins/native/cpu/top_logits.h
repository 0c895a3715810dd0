// The largest entries of a row of logits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace qwen {

// Sorted: larger first, of equal ones the lower id first; NaN counts as largest.
struct Entry {
  float value;
  int32_t id;
};

// The K first entries of x[n] in that order, ids counted from `first`; found holds min(K, n) of them. Returns how many.
#define QWEN_TOP_LOGITS(SET) \
  namespace SET {            \
  size_t top_logits(const float* x, size_t n, int32_t first, size_t K, Entry* found); \
  }
QWEN_SETS(QWEN_TOP_LOGITS)

inline bool before(const Entry& a, const Entry& b) {
  const bool lost = a.value != a.value, other = b.value != b.value;
  if (lost != other) return lost;
  if (!lost && a.value != b.value) return a.value > b.value;
  return a.id < b.id;
}

}  // namespace qwen
