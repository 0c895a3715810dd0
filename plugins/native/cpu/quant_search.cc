#include "quant_search.h"

extern "C" __attribute__((visibility("default"))) void qwen_search_scales(const float* w, int64_t count, int64_t block, float top,
                                                                          const float* shares, int64_t tries, float* scales) {
  static const auto search = QWEN_BEST(search_scales);
  search(w, count, block, top, shares, tries, scales);
}
