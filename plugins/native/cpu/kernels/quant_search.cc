#include "../quant_search.h"

#include <algorithm>
#include <cmath>

#include "vector.h"

namespace qwen::QWEN_SET {
namespace {

constexpr int kTries = 4;  // ranges that are tried side by side

// <w,q> and <q,q> for codes q of w * factor, for some factors.
void correlate(const float* w, int64_t block, const float* factors, float top, Four* dot, Four* square) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
  const Vector low = Vector{} - top, high = Vector{} + (top - 1);
  Vector dots[kTries] = {}, squares[kTries] = {};
  for (int64_t k = 0; k < block; k += int64_t(kLanes)) {
    const Vector values = load(w + k);
    for (int t = 0; t < kTries; t++) {
      Vector q = (values * factors[t] + shift) - shift;
      q = q < low ? low : q;
      q = q > high ? high : q;
      dots[t] += values * q;
      squares[t] += q * q;
    }
  }
  *dot = sums(dots[0], dots[1], dots[2], dots[3]);
  *square = sums(squares[0], squares[1], squares[2], squares[3]);
}

// What the codes' lower end, which reaches one further than the upper, is for: the value of the largest magnitude.
float extreme(const float* w, int64_t block) {
  Vector high = load(w), low = high;
  for (int64_t k = int64_t(kLanes); k < block; k += int64_t(kLanes)) {
    const Vector values = load(w + k);
    high = values > high ? values : high;
    low = values < low ? values : low;
  }
  float highest = high[0], lowest = low[0];
  for (size_t i = 1; i < kLanes; i++) highest = std::max(highest, high[i]), lowest = std::min(lowest, low[i]);
  return highest > -lowest ? highest : lowest;
}

}  // namespace

void search_scales(const float* w, int64_t count, int64_t block, float top, const float* shares, int64_t tries, float* scales) {
  for (int64_t b = 0; b < count; b++, w += block) {
    const float widest = -extreme(w, block) / top;
    const float inverse = std::fabs(widest) > 1e-37f ? 1 / widest : 0;
    float best = 0, gain = -1;
    for (int64_t first = 0; first < tries; first += kTries) {
      float factors[kTries];
      for (int t = 0; t < kTries; t++) factors[t] = inverse / shares[std::min(first + t, tries - 1)];
      Four dot, square;
      correlate(w, block, factors, top, &dot, &square);
      for (int t = 0; t < kTries; t++) {
        const float codes = std::max(square[t], 1e-30f), gained = dot[t] * dot[t] / codes;
        if (gained > gain) gain = gained, best = dot[t] / codes;
      }
    }
    scales[b] = best;
  }
}

void block_codes(const float* w, int64_t count, int64_t block, const float* inverse, float top, uint8_t* codes) {
  for (int64_t b = 0; b < count; b++, w += block, codes += block) {
    const float factor = inverse[b];
    for (int64_t k = 0; k < block; k++) {
      float q = __builtin_rintf(w[k] * factor);
      q = q < -top ? -top : q;
      q = q > top - 1 ? top - 1 : q;
      codes[k] = uint8_t(int32_t(q + top));
    }
  }
}

}  // namespace qwen::QWEN_SET
