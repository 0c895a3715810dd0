// Vectors of fp32 as wide as the instruction set's registers, from the compilers' vector extension. Included by kernels only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace qwen {
namespace QWEN_SET {

#if defined(__AVX512F__)
constexpr size_t kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr size_t kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr size_t kLanes = 4, kRegisters = 32;
#else
constexpr size_t kLanes = 4, kRegisters = 16;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2)));
typedef int8_t Codes __attribute__((vector_size(kLanes), aligned(1)));
typedef uint8_t Octets __attribute__((vector_size(kLanes), aligned(1)));
typedef float Four __attribute__((vector_size(16), aligned(4)));
typedef int32_t FourInts __attribute__((vector_size(16)));

struct Bf16 {
  uint16_t bits;
};

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

// By hand where gcc 12 makes five instructions of it.
inline Vector load(const Bf16* from) {
#if defined(__AVX512F__)
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16);
#elif defined(__AVX2__)
  return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16);
#else
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Bits) << 16);
#endif
}

// IEEE half precision. Where no instruction widens it, the exponent is moved by a product, which is exact; there are no infinities.
struct Half {
  uint16_t bits;
};

inline Vector load(const Half* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  const Bits x = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Bits);
  return (Vector)((x & 0x8000) << 16 | (x & 0x7fff) << 13) * 0x1p112f;
#endif
}

// An integer of eight bits as it is: the scale of its row is not here.
struct Code8 {
  int8_t value;
};

inline Vector load(const Code8* from) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(*reinterpret_cast<const Codes*>(from), Vector);
#endif
}

// float8 e4m3fn, without its NaN. As a half with the same bits further left it is 2^-8 of itself, numbers below 2^-6 included.
struct E4m3 {
  uint8_t bits;
};

inline Vector load(const E4m3* from) {
#if defined(__AVX512F__)
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i sign = _mm256_and_si256(_mm256_slli_epi16(x, 8), _mm256_set1_epi16(-0x8000));
  const __m256i rest = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(0x3f80));
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)), _mm512_set1_ps(256.0f));
#elif defined(__AVX2__)
  const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m128i sign = _mm_and_si128(_mm_slli_epi16(x, 8), _mm_set1_epi16(-0x8000));
  const __m128i rest = _mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16(0x3f80));
  return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, rest)), _mm256_set1_ps(256.0f));
#else
  const Bits x = __builtin_convertvector(*reinterpret_cast<const Octets*>(from), Bits);
  return (Vector)((x & 0x80) << 24 | (x & 0x7f) << 20) * 0x1p120f;
#endif
}

inline void store(float* to, Vector v) { *reinterpret_cast<Vector*>(to) = v; }

// The first `count` < kLanes values, then zeros.
template <typename W>
inline Vector load_part(const W* from, size_t count) {
  W part[kLanes] = {};
  std::memcpy(part, from, count * sizeof(W));
  return load(part);
}

// The sum of each vector's lanes, always in the same order.
inline Four sums(Vector a, Vector b, Vector c, Vector d) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#elif defined(__SSE2__)
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
  return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
#else
  const Vector all[] = {a, b, c, d};
  Four result;
  for (int i = 0; i < 4; i++) result[i] = (all[i][0] + all[i][1]) + (all[i][2] + all[i][3]);
  return result;
#endif
}

// e^x to 2 units in the last place; x is cut to -87..88, where fp32 ends.
inline Four exponential(Four x) {
  const Four low = Four{} - 87.0f, high = Four{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Four shifted = x * 1.44269504f + shift, n = shifted - shift;
  const Four r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Four p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (Four)((__builtin_convertvector(n, FourInts) + 127) << 23);
}

inline Four silu(Four x) { return x / (exponential(-x) + 1.0f); }

}  // namespace QWEN_SET
}  // namespace qwen
