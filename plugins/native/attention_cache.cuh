// What caches keep of a row of D values (qwen_export/cache_formats.py): the values themselves, or bytes that become values again when they are
// read. A row is written by one warp, and what its call goes on with is what the cache keeps of it: a token has the same keys and values
// whichever call reads them.
#pragma once

#include <cuda_fp8.h>

#include "attention_rows.cuh"
#include "attention_tile.cuh"

namespace qwen {

// 16-bit values.
struct PlainCache : PlainRow {
  template <typename T, int D>
  static __device__ void keep(LaneRow<T, D>& row, unsigned char* to, int lane) {
    row.store(reinterpret_cast<T*>(to), lane);
  }
};

template <typename T>
__device__ inline uint32_t as_pair(uint32_t half2);
template <>
__device__ inline uint32_t as_pair<__half>(uint32_t half2) {
  return half2;
}
template <>
__device__ inline uint32_t as_pair<__nv_bfloat16>(uint32_t half2) {
  const float2 x = __half22float2(reinterpret_cast<const __half2&>(half2));
  return pair<__nv_bfloat16>(x.x, x.y);
}

// A code per value, and the row's factor in fp32 behind them.
struct Int8Cache : Int8Row {
  // Two values from the bytes of a word that SELECT names, which are codes + 128.
  template <typename T, int SELECT>
  static __device__ uint32_t values(uint32_t word, float factor);

  // Eight values.
  template <typename T>
  static __device__ uint4 values(uint2 codes, float factor) {
    const uint32_t a = codes.x ^ 0x80808080u, b = codes.y ^ 0x80808080u;
    return make_uint4(values<T, 0x4140>(a, factor), values<T, 0x4342>(a, factor), values<T, 0x4140>(b, factor), values<T, 0x4342>(b, factor));
  }

  // Of a row in shared memory, and of one in global memory.
  static __device__ float factor(const unsigned char* row, int D) { return *reinterpret_cast<const float*>(row + D); }
  static __device__ float loaded_factor(const unsigned char* row, int D) { return __ldcg(reinterpret_cast<const float*>(row + D)); }

  template <typename T, int D>
  static __device__ void keep(LaneRow<T, D>& row, unsigned char* to, int lane) {
    constexpr int kItems = LaneRow<T, D>::kItems;
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; i++) most = fmaxf(most, fabsf(to_float(row.item[i])));
#pragma unroll
    for (int far = 16; far; far /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, far));
    const float factor = most / 127.0f, divisor = factor == 0.0f ? 1.0f : factor;
    union {
      int8_t item[kItems];
      uint16_t whole[kItems / 2];
    } codes;
#pragma unroll
    for (int i = 0; i < kItems; i++) codes.item[i] = int8_t(max(-127, min(127, __float2int_rn(to_float(row.item[i]) / divisor))));
#pragma unroll
    for (int i = 0; i < kItems / 2; i++) {
      reinterpret_cast<uint16_t*>(to + lane * kItems)[i] = codes.whole[i];
      const uint32_t kept = values<T, 0x4140>(uint32_t(codes.whole[i]) ^ 0x8080u, factor);
      row.item[2 * i] = reinterpret_cast<const T*>(&kept)[0], row.item[2 * i + 1] = reinterpret_cast<const T*>(&kept)[1];
    }
    if (lane == 0) *reinterpret_cast<uint4*>(to + D) = make_uint4(__float_as_uint(factor), 0, 0, 0);
  }
};

// In fp16 a product rounds once: codes are exact as 1024 + byte - 1152, and the factor is rounded to fp16 for all who read it.
template <int SELECT>
__device__ inline uint32_t half_values(uint32_t word, float factor) {
  const uint32_t codes = __byte_perm(word, 0x64646464u, SELECT);
  const __half2 x = __hmul2(__hsub2(reinterpret_cast<const __half2&>(codes), __float2half2_rn(1152.0f)), __float2half2_rn(factor));
  return reinterpret_cast<const uint32_t&>(x);
}
template <>
__device__ inline uint32_t Int8Cache::values<__half, 0x4140>(uint32_t word, float factor) { return half_values<0x4140>(word, factor); }
template <>
__device__ inline uint32_t Int8Cache::values<__half, 0x4342>(uint32_t word, float factor) { return half_values<0x4342>(word, factor); }

// In bf16 the factor would lose too much: fp32, as 2^23 + byte.
template <int FIRST>
__device__ inline uint32_t bf16_values(uint32_t word, float factor) {
  const float a = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540 + FIRST)) - 8388736.0f;
  const float b = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540 + FIRST + 1)) - 8388736.0f;
  return pair<__nv_bfloat16>(a * factor, b * factor);
}
template <>
__device__ inline uint32_t Int8Cache::values<__nv_bfloat16, 0x4140>(uint32_t word, float factor) { return bf16_values<0>(word, factor); }
template <>
__device__ inline uint32_t Int8Cache::values<__nv_bfloat16, 0x4342>(uint32_t word, float factor) { return bf16_values<2>(word, factor); }

// float8 e4m3fn. Its bits further left are a half of 2^-8 its size, small numbers included.
struct Fp8Cache : Fp8Row {
  // Two values from bytes SELECT names, which come to lie in the upper half of 16 bits each.
  template <typename T, int SELECT>
  static __device__ uint32_t values(uint32_t word) {
    const uint32_t x = __byte_perm(word, 0, SELECT), half2 = (x & 0x80008000u) | (x >> 1 & 0x3f803f80u);
    const __half2 made = __hmul2(reinterpret_cast<const __half2&>(half2), __float2half2_rn(256.0f));
    return as_pair<T>(reinterpret_cast<const uint32_t&>(made));
  }

  template <typename T>
  static __device__ uint4 values(uint2 codes, float) {
    return make_uint4(values<T, 0x1404>(codes.x), values<T, 0x3424>(codes.x), values<T, 0x1404>(codes.y), values<T, 0x3424>(codes.y));
  }

  static __device__ float factor(const unsigned char*, int) { return 1.0f; }
  static __device__ float loaded_factor(const unsigned char*, int) { return 1.0f; }

  template <typename T, int D>
  static __device__ void keep(LaneRow<T, D>& row, unsigned char* to, int lane) {
    constexpr int kItems = LaneRow<T, D>::kItems;
#pragma unroll
    for (int i = 0; i < kItems / 2; i++) {
      const uint32_t low = __nv_cvt_float_to_fp8(to_float(row.item[2 * i]), __NV_SATFINITE, __NV_E4M3);
      const uint32_t high = __nv_cvt_float_to_fp8(to_float(row.item[2 * i + 1]), __NV_SATFINITE, __NV_E4M3);
      reinterpret_cast<uint16_t*>(to + lane * kItems)[i] = uint16_t(low | high << 8);
      const uint32_t kept = values<T, 0x1404>(low | high << 8);
      row.item[2 * i] = reinterpret_cast<const T*>(&kept)[0], row.item[2 * i + 1] = reinterpret_cast<const T*>(&kept)[1];
    }
  }
};

template <typename Cache, int D>
constexpr int kCacheRow = (D + Cache::kBehind) * Cache::kElement;  // bytes

// `SLOTS` rows of a cache from `source`, as copy_tile; those of bytes are copied as they are, and expand_tile makes values of them.
template <typename T, typename Cache, int D, int SLOTS, int THREADS>
__device__ inline void copy_rows(uint32_t shared, const unsigned char* source, int there, int thread) {
  if constexpr (Cache::kPlain) {
    copy_tile<T, D, SLOTS, THREADS>(shared, reinterpret_cast<const T*>(source), there, thread);
  } else {
    constexpr int kUnits = kCacheRow<Cache, D> / 16, kCopies = SLOTS * kUnits;
#pragma unroll
    for (int i = 0; i < (kCopies + THREADS - 1) / THREADS; i++) {
      const int at = i * THREADS + thread;
      if (kCopies % THREADS != 0 && at >= kCopies) break;
      copy_unit(shared + at * 16, source + at * 16, at < there * kUnits);
    }
  }
}

// The values of SLOTS rows in shared memory, where copy_tile would have put them.
template <typename T, typename Cache, int D, int SLOTS, int THREADS>
__device__ inline void expand_tile(uint32_t shared, const unsigned char* rows, int thread) {
  constexpr int kUnits = D / 8, kStep = THREADS / kUnits;  // rows
  const int unit = thread % kUnits;
  // More at a time would need more registers than the sums leave.
#pragma unroll 4
  for (int row = thread / kUnits; row < SLOTS; row += kStep) {
    const unsigned char* from = rows + row * kCacheRow<Cache, D>;
    const uint4 x = Cache::template values<T>(*reinterpret_cast<const uint2*>(from + unit * 8), Cache::factor(from, D));
    asm volatile("st.shared.v4.b32 [%0],{%1,%2,%3,%4};" ::"r"(shared + row * D * 2 + ((unit ^ exchange<D>(row)) << 4)), "r"(x.x), "r"(x.y), "r"(x.z),
                 "r"(x.w)
                 : "memory");
  }
}

}  // namespace qwen
