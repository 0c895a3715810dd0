// The scale of each block of weights that represents it with the least squared error, of several ranges: quantization while a bundle is
// built, which graphs/quantization/native_search.py calls through ctypes. Not an op.
#pragma once

#include <cstdint>

#include "isa.h"

namespace qwen {

// `count` blocks of `block` values each, a multiple of 16; codes are -top .. top - 1. `shares`: ranges to try, of the one that ends at the
// largest value. For codes q the best scale is <w,q> / <q,q>, and the error falls with <w,q>^2 / <q,q>.
#define QWEN_SEARCH_SCALES(SET)                                                                                                        \
  namespace SET {                                                                                                                      \
  void search_scales(const float* w, int64_t count, int64_t block, float top, const float* shares, int64_t tries, float* scales);      \
  }
QWEN_SETS(QWEN_SEARCH_SCALES)

}  // namespace qwen
