// How blocks of one launch hand values to each other: words of 4 bytes, two values of 16 bits, which read as kNotYet until they have come.
// There is no barrier, and no second way to the data behind one. A call reads one of two buffers, and clears the other for the call after it.
#pragma once

#include "clusters.cuh"
#include "device.cuh"

namespace qwen {

constexpr uint32_t kNotYet = 0xFFFFFFFFu;  // two NaNs of bits that no arithmetic makes

__device__ inline uint4 load_words(const uint32_t* at) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
  return v;
}
__device__ inline bool come(const uint4& v) { return v.x != kNotYet && v.y != kNotYet && v.z != kNotYet && v.w != kNotYet; }
__device__ inline void store_word(uint32_t* at, uint32_t value) { asm volatile("st.relaxed.gpu.global.u32 [%0],%1;" ::"l"(at), "r"(value) : "memory"); }
template <typename T>
__device__ inline uint32_t pair_of(T first, T second) {
  Pack2<T> both;
  both.item[0] = first, both.item[1] = second;
  return both.bits;
}

}  // namespace qwen
