// Quantizing activations: per row and block to -127..127.

#include <cmath>
#include <cstring>

#include "../quant.h"
#include "normalize_row.h"
#include "quant_lanes.h"

namespace qwen::QWEN_SET {
namespace {

float largest(const float* x, int count) {
#if defined(__AVX512F__)
  __m512 most = _mm512_setzero_ps();
  for (int k = 0; k < count; k += 16) most = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(x + k)), most);
  return _mm512_reduce_max_ps(most);
#else
  float parts[16] = {};
  for (int k = 0; k < count; k += 16)
    for (int i = 0; i < 16; i++) {
      const float magnitude = std::fabs(x[k + i]);
      parts[i] = magnitude > parts[i] ? magnitude : parts[i];
    }
  float result = 0;
  for (float part : parts) result = part > result ? part : result;
  return result;
#endif
}

// 32 values times `inverse`, rounded to the nearest even, into `made`; returns their sum.
inline int32_t round_unit(const float* values, float inverse, int8_t* made) {
#if defined(__AVX512F__)
  const __m512 by = _mm512_set1_ps(inverse);
  const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values), by));
  const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + 16), by));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(made), _mm512_cvtepi32_epi8(low));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(made + 16), _mm512_cvtepi32_epi8(high));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
#else
  int32_t sum = 0;
  for (int i = 0; i < kQuantUnit; i++) made[i] = int8_t(int32_t(std::nearbyint(values[i] * inverse)));
  for (int i = 0; i < kQuantUnit; i++) sum += made[i];
  return sum;
#endif
}

}  // namespace

void quantize_tile(const QuantFormat& format, const float* x, const float* norm, float epsilon, float* scratch, QuantTile tile) {
  const int64_t K = format.K;
  if (tile.rows < tile.slots) std::memset(tile.codes, 0, QuantTile::bytes(format, tile.slots));
  for (int m = 0; m < tile.rows; m++, x += K) {
    if (norm != nullptr) {
      normalize_row(x, norm, epsilon, K, scratch);
    } else {
      std::memcpy(scratch, x, sizeof(float) * K);
    }
    std::memset(scratch + K, 0, sizeof(float) * (format.padded() - K));
    for (int64_t block = 0; block < format.blocks(); block++) {
      const float* values = scratch + block * format.block;
      const float most = largest(values, format.block);
      const float inverse = most > 0 ? 127.0f / most : 0.0f;
      int32_t sum = 0;
      for (int k = 0; k < format.block; k += 32) {
        alignas(32) int8_t made[kQuantUnit];
        sum += round_unit(values + k, inverse, made);
        const int64_t at = block * format.block + k;
        if (tile.unit == 4)
          for (int i = 0; i < 8; i++) std::memcpy(tile.codes + ((at / 4 + i) * tile.slots + m) * 4, made + 4 * i, 4);
        else
          std::memcpy(tile.codes + (at / tile.unit * tile.slots + m) * tile.unit + at % tile.unit, made, 32);
      }
      const int64_t at = block * tile.slots + m;
      tile.scales[at] = most / 127.0f;
      if (format.zeros) {
        tile.corrections[at] = float(sum);
      } else {
        const int32_t begin = -sum * (format.offset() - (format.bits == 8 ? kBias<8> : kBias<4>));
        std::memcpy(tile.corrections + at, &begin, 4);
      }
    }
  }
}

}  // namespace qwen::QWEN_SET
