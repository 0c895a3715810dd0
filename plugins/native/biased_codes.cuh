// Four-bit codes as operands of the tensor cores with one instruction for two of them: bits of an exponent are set around a code, which makes it
// 1024 + code or 64 + code in fp16, and 128 + code in bf16. That bias, and the zero in the middle of the codes, add a multiple of the activations
// to the sum over a block: the excess, which is taken off again. For matrices without zeros of their own (quant.cuh).
#pragma once

#include <type_traits>

#include "device.cuh"
#include "mma.cuh"
#include "quant_fragments.cuh"

namespace qwen {

constexpr int kBiasedBlock = 32;  // k of which the sums of activations are taken

template <typename T>
struct BiasedCodes {
  static constexpr bool kHalf = std::is_same<T, __half>::value;
  static constexpr float kLowZero = kHalf ? 1032.0f : 136.0f, kHighZero = kHalf ? 72.0f : 136.0f;

  // The codes in bits 0..3 and 16..19 of a word, and those in bits 4..7 and 20..23.
  __device__ static uint32_t low(uint32_t word) { return masked(word, 0x000F000Fu, kHalf ? 0x64006400u : 0x43004300u); }
  __device__ static uint32_t high(uint32_t word) { return kHalf ? masked(word, 0x00F000F0u, 0x54005400u) : low(word >> 4); }

  // Eight values in the order of the codes in a word: 0, 2, 4, 6, 1, 3, 5, 7.
  __device__ static uint4 arranged(const uint4& bits) {
    return make_uint4(__byte_perm(bits.x, bits.y, 0x5410), __byte_perm(bits.z, bits.w, 0x5410), __byte_perm(bits.x, bits.y, 0x7632),
                      __byte_perm(bits.z, bits.w, 0x7632));
  }

  // Of a block. Four neighboring lanes have its activations, eight each, and get the same value. All lanes of the warp.
  __device__ static float excess_of(const Pack8<T>& value) {
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) low += to_float(value.item[i]), high += to_float(value.item[4 + i]);
    float sum = low * kLowZero + high * kHighZero;
#pragma unroll
    for (int step = 1; step < kBiasedBlock / 8; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
  }

  // c += the product of 32 k. `first` and `second` are a lane's 8 codes of two neighboring rows, x its arranged activations.
  __device__ static void multiply_block(float (&c)[4], uint32_t first, uint32_t second, const uint4& x) {
    multiply<T>(c, low(first), low(second), high(first), high(second), x.x, x.y);
    multiply<T>(c, low(first >> 8), low(second >> 8), high(first >> 8), high(second >> 8), x.z, x.w);
  }
};

}  // namespace qwen
