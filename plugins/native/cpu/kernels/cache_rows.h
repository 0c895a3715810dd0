// Rows of a cache in the formats of CacheFormat: how they are written, and the factors of a block of them. Included by kernels only.
#pragma once

#include "../attention.h"
#include "vector_math.h"

namespace qwen {
namespace QWEN_SET {

constexpr float kMostCode = 127.0f, kMostHalf = 65504.0f, kMostE4m3 = 448.0f;

// The factors of up to kCacheBlock rows, for their scores or weights: those of int8. Other formats keep the values themselves.
template <typename W>
struct RowScales {
  RowScales(const W*, int64_t, int64_t, int64_t) {}
  void apply(float*) const {}
};

template <>
struct RowScales<Code8> {
  // Of `count` rows of D codes, `row` bytes apart.
  RowScales(const Code8* from, int64_t D, int64_t row, int64_t count) {
    for (int64_t j = 0; j < count; j++) std::memcpy(scale + j, reinterpret_cast<const char*>(from) + j * row + D, sizeof(float));
    std::memset(scale + count, 0, size_t(kCacheBlock - count) * sizeof(float));
  }
  // To p [kCacheBlock]; entries behind the rows may be anything before and after.
  void apply(float* p) const {
    for (int64_t j = 0; j < kCacheBlock; j += kStep) store(p + j, load(p + j) * load(scale + j));
  }
  float scale[kCacheBlock];
};

// To nearest, ties to even; |x| < 2^22.
inline Vector to_integers(Vector x) { return (x + all(12582912.0f)) - all(12582912.0f); }

inline Vector within(Vector x, float most) {
  x = x > all(most) ? all(most) : x;
  return x < all(-most) ? all(-most) : x;
}

// The bits of x as e4m3, to nearest, ties to even; what is larger than the largest becomes that.
inline Bits e4m3_of(Vector x) {
  const Bits given = (Bits)within(x, kMostE4m3), sign = given >> 24 & 0x80, size = given & 0x7fffffff;
  const Bits normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);
  const Bits small = (Bits)((Vector)size + all(16384.0f)) - (Bits)all(16384.0f);  // in steps of 2^-9
  return sign | (size < 0x3c800000 ? small : normal);                            // from 2^-6 on
}

// The bits of x as a half, likewise.
inline Bits half_of(Vector x) {
  const Bits given = (Bits)within(x, kMostHalf), sign = given >> 16 & 0x8000, size = given & 0x7fffffff;
  const Bits normal = ((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10);
  const Bits small = (Bits)((Vector)size + all(0.5f)) - (Bits)all(0.5f);  // in steps of 2^-24
  return sign | (size < 0x38800000 ? small : normal);                    // from 2^-14 on
}

// D values of `code(vector)`, one of C each.
template <typename C, typename Code>
void write_codes(const float* x, int64_t D, unsigned char* to, const Code& code) {
  for (int64_t d = 0; d < D; d += kStep) {
    const size_t count = size_t(D - d < kStep ? D - d : kStep);
    const Bits bits = code(count == kLanes ? load(x + d) : load_part(x + d, count));
    C part[kLanes];
    for (size_t i = 0; i < kLanes; i++) part[i] = C(bits[i]);
    std::memcpy(to + size_t(d) * sizeof(C), part, count * sizeof(C));
  }
}

inline float largest_of(const float* x, int64_t D) {
  float most = 0;
  for (int64_t d = 0; d < D; d++) most = fabsf(x[d]) <= most || most != most ? most : fabsf(x[d]);  // NaN stays
  return most;
}

// D values as a row of a cache.
inline void write_row(CacheFormat format, const float* x, int64_t D, unsigned char* to) {
  switch (format) {
    case CacheFormat::kFp32: std::memcpy(to, x, size_t(D) * sizeof(float)); return;
    case CacheFormat::kFp16: return write_codes<uint16_t>(x, D, to, half_of);
    case CacheFormat::kFp8: return write_codes<uint8_t>(x, D, to, e4m3_of);
    case CacheFormat::kInt8: {
      const float scale = largest_of(x, D) / kMostCode, divisor = scale == 0 ? 1 : scale;
      const auto code = [&](Vector v) { return (Bits)__builtin_convertvector(to_integers(within(v / all(divisor), kMostCode)), Ints); };
      write_codes<uint8_t>(x, D, to, code);
      std::memset(to + D, 0, size_t(kScaleBytes));
      std::memcpy(to + D, &scale, sizeof(scale));
      return;
    }
  }
}

}  // namespace QWEN_SET
}  // namespace qwen
