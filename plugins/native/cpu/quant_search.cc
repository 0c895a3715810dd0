#include "quant_search.h"

extern "C" __attribute__((visibility("default"))) void qwen_search_scales(const float* w, int64_t count, int64_t block, float top,
                                                                          const float* shares, int64_t tries, float* scales) {
  static const auto search = QWEN_BEST(search_scales);
  search(w, count, block, top, shares, tries, scales);
}

extern "C" __attribute__((visibility("default"))) void qwen_block_codes(const float* w, int64_t count, int64_t block, const float* inverse, float top,
                                                                        uint8_t* codes) {
  static const auto make = QWEN_BEST(block_codes);
  make(w, count, block, inverse, top, codes);
}
