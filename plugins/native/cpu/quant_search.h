// Quantization while a bundle is built, which plugins/native/native_search.py calls through ctypes: the scale of each block of weights that
// represents it with the least squared error, of several ranges, and the codes for given scales. Not an op.
#pragma once

#include <cstdint>

#include "isa.h"

namespace qwen {

// `count` blocks of `block` values each, a multiple of 16; codes are -top .. top - 1. `shares`: ranges to try, of the one that ends at the
// largest value. For codes q the best scale is <w,q> / <q,q>, and the error falls with <w,q>^2 / <q,q>.
//
// block_codes: w * inverse of its block, rounded to even and clipped, plus top. The bits are numpy's: product and rounding are two operations.
#define QWEN_SEARCH_SCALES(SET)                                                                                                        \
  namespace SET {                                                                                                                      \
  void search_scales(const float* w, int64_t count, int64_t block, float top, const float* shares, int64_t tries, float* scales);      \
  void block_codes(const float* w, int64_t count, int64_t block, const float* inverse, float top, uint8_t* codes);                     \
  }
QWEN_SETS(QWEN_SEARCH_SCALES)

}  // namespace qwen
