// The few vector operations that quant_product.cc is made of, per instruction set: `Ints` and `Floats` are kLanes values wide, `Codes` is
// kLanes times 4 unsigned bytes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// gcc 12 takes the undefined pass-through operand of its own AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace qwen::QWEN_SET {

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  float value;
  if (magnitude < 0x0400) {  // subnormal
    value = float(magnitude) * 0x1p-24f;
  } else {
    const uint32_t wide = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);
    std::memcpy(&value, &wide, 4);
  }
  uint32_t result;
  std::memcpy(&result, &value, 4);
  result |= sign;
  std::memcpy(&value, &result, 4);
  return value;
}

// How far ahead codes are fetched from memory into the second cache, and from there into the first: codes follow codes, and the next panel
// follows this one. 4 KB straight into the first cache takes up to 1.5 times as long.
constexpr int kFarAhead = 4096, kNearAhead = 512;

// Prefetches what is read soon.
template <int BYTES>
inline void ahead(const uint8_t* codes) {
#if defined(__AVX2__)
  for (int line = 0; line < BYTES; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(codes) + kFarAhead + line, _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(codes) + kNearAhead + line, _MM_HINT_T0);
  }
#endif
}

#if defined(__AVX512VNNI__)

constexpr int kLanes = 16, kTileRows = 8;
using Ints = __m512i;
using Floats = __m512;
using Codes = __m512i;
template <int BITS>
constexpr int kBias = 0;  // what `dot` has taken off the codes

inline Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Codes load_pairs(const uint8_t* p) {
  Codes c = load_codes(p);
  __asm__("" : "+v"(c));  // one load: without this the compiler loads again for each half
  return c;
}
inline Codes low(Codes c) { return _mm512_and_si512(c, _mm512_set1_epi8(15)); }
inline Codes high(Codes c) { return _mm512_and_si512(_mm512_srli_epi16(c, 4), _mm512_set1_epi8(15)); }
template <int BITS>
inline Ints dot(Ints sum, Codes c, const int8_t* four) {
  int32_t a;
  std::memcpy(&a, four, 4);
  return _mm512_dpbusd_epi32(sum, c, _mm512_set1_epi32(a));
}
inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Ints start(const float* bits) { return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(bits)); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats zero_floats() { return _mm512_setzero_ps(); }
inline Floats same(float x) { return _mm512_set1_ps(x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats subtract_product(Floats c, Floats a, Floats b) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats load_scales(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Floats load_scales(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load_zeros(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
inline Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }

#elif defined(__AVX2__)

// Without VNNI, products of bytes are summed in 16 bits: 4 of a code of 4 bits and an activation fit; for 8 bits the sign moves to the
// activation, |code - 128| <= 128, so that two products stay below 2^15.
constexpr int kLanes = 8, kTileRows = 4;
using Ints = __m256i;
using Floats = __m256;
using Codes = __m256i;
template <int BITS>
constexpr int kBias = BITS == 8 ? 128 : 0;

inline Codes load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Codes load_pairs(const uint8_t* p) { return load_codes(p); }
inline Codes low(Codes c) { return _mm256_and_si256(c, _mm256_set1_epi8(15)); }
inline Codes high(Codes c) { return _mm256_and_si256(_mm256_srli_epi16(c, 4), _mm256_set1_epi8(15)); }
template <int BITS>
inline Ints dot(Ints sum, Codes c, const int8_t* four) {
  int32_t word;
  std::memcpy(&word, four, 4);
  __m256i a = _mm256_set1_epi32(word);
  if constexpr (BITS == 8) {
    c = _mm256_xor_si256(c, _mm256_set1_epi8(char(0x80)));
    a = _mm256_sign_epi8(a, c);
    c = _mm256_abs_epi8(c);
  }
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(c, a), _mm256_set1_epi16(1)));
}
inline Ints zero_ints() { return _mm256_setzero_si256(); }
inline Ints start(const float* bits) { return _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(bits)); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats zero_floats() { return _mm256_setzero_ps(); }
inline Floats same(float x) { return _mm256_set1_ps(x); }
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats subtract_product(Floats c, Floats a, Floats b) { return _mm256_fnmadd_ps(a, b, c); }
inline Floats load_scales(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Floats load_scales(const float* p) { return _mm256_loadu_ps(p); }
inline Floats load_zeros(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
inline Ints load_ints(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }

#else

constexpr int kLanes = 4, kTileRows = 1;
struct Ints {
  int32_t v[kLanes];
};
struct Floats {
  float v[kLanes];
};
struct Codes {
  uint8_t v[kLanes * 4];
};
template <int BITS>
constexpr int kBias = 0;

template <typename Result, typename F>
inline Result each(F f) {
  Result r;
  for (int i = 0; i < int(sizeof(r.v) / sizeof(r.v[0])); i++) r.v[i] = f(i);
  return r;
}
inline Codes load_codes(const uint8_t* p) { return each<Codes>([=](int i) { return p[i]; }); }
inline Codes load_pairs(const uint8_t* p) { return load_codes(p); }
inline Codes low(Codes c) { return each<Codes>([=](int i) { return uint8_t(c.v[i] & 15); }); }
inline Codes high(Codes c) { return each<Codes>([=](int i) { return uint8_t(c.v[i] >> 4); }); }
template <int BITS>
inline Ints dot(Ints sum, Codes c, const int8_t* a) {
  for (int i = 0; i < kLanes; i++)
    for (int j = 0; j < 4; j++) sum.v[i] += int32_t(c.v[4 * i + j]) * a[j];
  return sum;
}
inline Ints zero_ints() { return Ints{}; }
inline Ints start(const float* bits) {
  int32_t x;
  std::memcpy(&x, bits, 4);
  return each<Ints>([=](int) { return x; });
}
inline Ints add(Ints a, Ints b) { return each<Ints>([=](int i) { return a.v[i] + b.v[i]; }); }
inline Floats add(Floats a, Floats b) { return each<Floats>([=](int i) { return a.v[i] + b.v[i]; }); }
inline Floats zero_floats() { return Floats{}; }
inline Floats same(float x) { return each<Floats>([=](int) { return x; }); }
inline Floats to_floats(Ints x) { return each<Floats>([=](int i) { return float(x.v[i]); }); }
inline Floats multiply(Floats a, Floats b) { return each<Floats>([=](int i) { return a.v[i] * b.v[i]; }); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return each<Floats>([=](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline Floats subtract_product(Floats c, Floats a, Floats b) { return each<Floats>([=](int i) { return c.v[i] - a.v[i] * b.v[i]; }); }
inline Floats load_scales(const uint16_t* p) { return each<Floats>([=](int i) { return half_to_float(p[i]); }); }
inline Floats load_scales(const float* p) { return each<Floats>([=](int i) { return p[i]; }); }
inline Floats load_zeros(const uint8_t* p) { return each<Floats>([=](int i) { return float(p[i]); }); }
inline Ints load_ints(const int32_t* p) { return each<Ints>([=](int i) { return p[i]; }); }
inline void store(float* p, Floats x) { std::memcpy(p, x.v, sizeof(x.v)); }

#endif

}  // namespace qwen::QWEN_SET
