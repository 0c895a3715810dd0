// The norm of a row, for the kernels that bring activations into another form.
#pragma once

#include <cmath>
#include <cstdint>

namespace qwen::QWEN_SET {

// Sums in 16 parts: the compiler may keep them in registers, and the order does not depend on the instruction set's width.
inline float mean_of_squares(const float* x, int64_t K) {
  float parts[16] = {};
  int64_t k = 0;
  for (; k + 16 <= K; k += 16)
    for (int i = 0; i < 16; i++) parts[i] += x[k + i] * x[k + i];
  float sum = 0;
  for (; k < K; k++) sum += x[k] * x[k];
  for (float part : parts) sum += part;
  return sum / float(K);
}

// out = x / sqrt(mean(x^2) + epsilon) * norm, of K values.
inline void normalize_row(const float* x, const float* norm, float epsilon, int64_t K, float* out) {
  const float scale = 1.0f / std::sqrt(mean_of_squares(x, K) + epsilon);
  for (int64_t k = 0; k < K; k++) out[k] = x[k] * scale * norm[k];
}

}  // namespace qwen::QWEN_SET
