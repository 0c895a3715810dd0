// Fragments of weights for the tensor cores, made of packed codes in registers: (code - zero) * scale, rounded once to the element type as by
// `dequantize`.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace qwen {

// bits and `mask`, with those of `magic` set: one instruction, if neither is written into it.
__device__ inline uint32_t masked(uint32_t bits, uint32_t mask, uint32_t magic) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(bits), "r"(mask), "r"(magic));
  return result;
}
__device__ inline uint32_t held(uint32_t constant) {  // in a register, of which the compiler knows nothing
  uint32_t x;
  asm volatile("mov.u32 %0, %1;" : "=r"(x) : "r"(constant));
  return x;
}
__device__ inline __half2 as_half2(uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); }
__device__ inline uint32_t bits_of(__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }

// Makes a lane's fragments of 32 k for two products, a[0..3] and a[4..7], of its codes of two rows. `load` takes the scales and zeros of neighbors, at
// place `at` of a block, `load_two` those of rows at the same place of two panels. GENERAL: any element type, zeros (null where there are none) and scales in fp32 (`wide`); rounded from fp32.
template <typename T, int BITS, bool GENERAL>
struct Weights;
template <typename T, int BITS>
struct Weights<T, BITS, true> {
  float scale0, scale1, bias0, bias1;
  __device__ void load(const uint8_t* scales, const uint8_t* zeros, bool wide, int at) {
    const float2 scale = wide ? *reinterpret_cast<const float2*>(scales + at * 4) : __half22float2(*reinterpret_cast<const __half2*>(scales + at * 2));
    scale0 = scale.x, scale1 = scale.y;
    uint32_t zero0 = 1u << (BITS - 1), zero1 = zero0;
    if (zeros != nullptr) {
      const uchar2 both = *reinterpret_cast<const uchar2*>(zeros + at);
      zero0 = both.x, zero1 = both.y;
    }
    bias0 = __uint_as_float(0x4B000000u | zero0), bias1 = __uint_as_float(0x4B000000u | zero1);
  }
  __device__ void load_two(const uint8_t* first, const uint8_t* second, int zeros_at, bool zeros, bool wide, int at) {
    const auto scale = [&](const uint8_t* from) {
      return wide ? reinterpret_cast<const float*>(from)[at] : __half2float(reinterpret_cast<const __half*>(from)[at]);
    };
    const auto bias = [&](const uint8_t* from) { return __uint_as_float(0x4B000000u | (zeros ? from[zeros_at + at] : 1u << (BITS - 1))); };
    scale0 = scale(first), scale1 = scale(second), bias0 = bias(first), bias1 = bias(second);
  }
  __device__ static uint32_t pair(uint32_t word, float bias, float scale) {
    float low, high;
    if constexpr (BITS == 4) {
      low = __uint_as_float((word & 15u) | 0x4B000000u), high = __uint_as_float((word >> 16 & 15u) | 0x4B000000u);
    } else {
      low = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440)), high = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7441));
    }
    low = (low - bias) * scale, high = (high - bias) * scale;
    if constexpr (std::is_same<T, __half>::value) {
      return bits_of(__floats2half2_rn(low, high));
    } else {
      const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&both);
    }
  }
  // 4 bits: all codes are in `v`, of the first row v.x, of the second v.y. 8: k 0 to 3 in v, 4 to 7 in w.
  __device__ void of(const uint2& v, const uint2& w, uint32_t* a) const {
    if constexpr (BITS == 4) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[2 * i] = pair(v.x >> 4 * i, bias0, scale0), a[2 * i + 1] = pair(v.y >> 4 * i, bias1, scale1);
    } else {
      a[0] = pair(v.x, bias0, scale0), a[1] = pair(v.y, bias1, scale1), a[2] = pair(v.x >> 16, bias0, scale0), a[3] = pair(v.y >> 16, bias1, scale1);
      a[4] = pair(w.x, bias0, scale0), a[5] = pair(w.y, bias1, scale1), a[6] = pair(w.x >> 16, bias0, scale0), a[7] = pair(w.y >> 16, bias1, scale1);
    }
  }
};
// fp16, scales in fp16, no zeros: codes minus zeros are exact in fp16, and so is all but the last product.
template <>
struct Weights<__half, 4, false> {
  __half2 scale;
  uint32_t low = held(0x000F000Fu), high = held(0x00F000F0u), magic = held(0x64006400u);
  __device__ void load(const uint8_t* scales, const uint8_t*, bool, int at) { scale = *reinterpret_cast<const __half2*>(scales + at * 2); }
  __device__ void load_two(const uint8_t* first, const uint8_t* second, int, bool, bool, int at) {
    scale = __halves2half2(reinterpret_cast<const __half*>(first)[at], reinterpret_cast<const __half*>(second)[at]);
  }
  __device__ void of(const uint2& v, const uint2&, uint32_t* a) const {
    // 1024 + code, and 1024 + 16 code of the codes four bits further.
    const __half2 zero = __float2half2_rn(-1032.0f), sixteenth = __float2half2_rn(0.0625f), high_zero = __float2half2_rn(-72.0f);
    const __half2 scale0 = __low2half2(scale), scale1 = __high2half2(scale);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t x = v.x >> 8 * i, y = v.y >> 8 * i;
      a[4 * i] = bits_of(__hmul2(__hadd2(as_half2(masked(x, low, magic)), zero), scale0));
      a[4 * i + 1] = bits_of(__hmul2(__hadd2(as_half2(masked(y, low, magic)), zero), scale1));
      a[4 * i + 2] = bits_of(__hmul2(__hfma2(as_half2(masked(x, high, magic)), sixteenth, high_zero), scale0));
      a[4 * i + 3] = bits_of(__hmul2(__hfma2(as_half2(masked(y, high, magic)), sixteenth, high_zero), scale1));
    }
  }
};
template <>
struct Weights<__half, 8, false> {
  __half2 scale;
  uint32_t magic = held(0x64646464u);
  __device__ void load(const uint8_t* scales, const uint8_t*, bool, int at) { scale = *reinterpret_cast<const __half2*>(scales + at * 2); }
  __device__ void load_two(const uint8_t* first, const uint8_t* second, int, bool, bool, int at) {
    scale = __halves2half2(reinterpret_cast<const __half*>(first)[at], reinterpret_cast<const __half*>(second)[at]);
  }
  __device__ void of(const uint2& v, const uint2& w, uint32_t* a) const {
    const __half2 zero = __float2half2_rn(-1152.0f), scale0 = __low2half2(scale), scale1 = __high2half2(scale);
    const auto pair = [&](uint32_t word, int select, __half2 scale) {
      return bits_of(__hmul2(__hadd2(as_half2(__byte_perm(word, magic, select)), zero), scale));
    };
    a[0] = pair(v.x, 0x4140, scale0), a[1] = pair(v.y, 0x4140, scale1), a[2] = pair(v.x, 0x4342, scale0), a[3] = pair(v.y, 0x4342, scale1);
    a[4] = pair(w.x, 0x4140, scale0), a[5] = pair(w.y, 0x4140, scale1), a[6] = pair(w.x, 0x4342, scale0), a[7] = pair(w.y, 0x4342, scale1);
  }
};

}  // namespace qwen
