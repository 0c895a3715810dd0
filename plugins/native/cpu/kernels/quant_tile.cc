// Quantizing activations: per row and block to -127..127.

#include <cmath>
#include <cstring>

#include "../quant.h"
#include "quant_lanes.h"

namespace qwen::QWEN_SET {
namespace {

// Sums in 16 parts: the compiler may keep them in registers, and the order does not depend on the instruction set's width.
float mean_of_squares(const float* x, int64_t K) {
  float parts[16] = {};
  int64_t k = 0;
  for (; k + 16 <= K; k += 16)
    for (int i = 0; i < 16; i++) parts[i] += x[k + i] * x[k + i];
  float sum = 0;
  for (; k < K; k++) sum += x[k] * x[k];
  for (float part : parts) sum += part;
  return sum / float(K);
}

float largest(const float* x, int count) {
  float parts[16] = {};
  for (int k = 0; k < count; k += 16)
    for (int i = 0; i < 16; i++) {
      const float magnitude = std::fabs(x[k + i]);
      parts[i] = magnitude > parts[i] ? magnitude : parts[i];
    }
  float result = 0;
  for (float part : parts) result = part > result ? part : result;
  return result;
}

}  // namespace

void quantize_tile(const QuantFormat& format, const float* x, const float* norm, float epsilon, float* scratch, QuantTile tile) {
  const int64_t K = format.K;
  if (tile.rows < tile.slots) std::memset(tile.codes, 0, QuantTile::bytes(format, tile.slots));
  for (int m = 0; m < tile.rows; m++, x += K) {
    if (norm != nullptr) {
      const float scale = 1.0f / std::sqrt(mean_of_squares(x, K) + epsilon);
      for (int64_t k = 0; k < K; k++) scratch[k] = x[k] * scale * norm[k];
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
        alignas(32) int8_t made[32];
        for (int i = 0; i < 32; i++) made[i] = int8_t(int32_t(std::nearbyint(values[k + i] * inverse)));
        for (int i = 0; i < 32; i++) sum += made[i];
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
