// Arithmetic on whole vectors in which every rounding is written out: products and sums are fused by `fma` and nowhere else, so
// that the same formula gives the same bits wherever it stands.
#pragma once

#include <math.h>

#include "vector.h"

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace qwen {
namespace QWEN_SET {

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

constexpr int64_t kStep = kLanes;  // as a signed size

inline void store_part(float* to, Vector x, size_t count) { std::memcpy(to, &x, count * sizeof(float)); }

inline Vector all(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return Vector{x, x, x, x};
#endif
}

// a b + c, fused where the instruction set can
inline Vector fma(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline float sum(Vector x) {
  float part[kLanes];
  store(part, x);
  for (size_t half = kLanes / 2; half; half /= 2)
    for (size_t i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}

// e^x to 2 units in the last place for |x| < 87; beyond, that of the nearer bound. NaN stays.
inline Vector exponentials(Vector x) {
  x = x > all(87.0f) ? all(87.0f) : x;
  x = x < all(-87.0f) ? all(-87.0f) : x;
  const Vector shifted = fma(x, all(1.44269504f), all(12582912.0f));  // 1.5 * 2^23: the integer part lands in the low bits
  const Vector n = shifted - all(12582912.0f);
  Vector r = fma(n, all(-0.693145752f), x);
  r = fma(n, all(-1.42860677e-6f), r);
  Vector p = all(1.0f / 5040);
  p = fma(p, r, all(1.0f / 720));
  p = fma(p, r, all(1.0f / 120));
  p = fma(p, r, all(1.0f / 24));
  p = fma(p, r, all(1.0f / 6));
  p = fma(p, r, all(0.5f));
  p = fma(p, r * r, r) + all(1.0f);
  return (Vector)(((Ints)shifted << 23) + (Ints)p);  // these casts keep the bits
}

// x / (1 + e^-x)
inline Vector swish(Vector x) { return x / (all(1.0f) + exponentials(-x)); }

}  // namespace QWEN_SET
}  // namespace qwen
