// How blocks of one launch hand values to each other: words of 8 bytes whose second half is the number of the call. Who reads a word sees whether it
// has come; there is no barrier, and no second way to the data behind one.
#pragma once

#include "clusters.cuh"
#include "device.cuh"

namespace qwen {

template <typename T>
union Pack2 {
  uint32_t bits;
  T item[2];
};
template <typename T>
union Pack4 {
  uint2 bits;
  T item[4];
};

__device__ inline uint4 load_words(const uint2* at) {
  uint4 v;
  asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
  return v;
}
__device__ inline void store_words(uint2* at, uint32_t first, uint32_t second, uint32_t call) {
  asm volatile("st.volatile.global.v4.u32 [%0],{%1,%2,%3,%2};" ::"l"(at), "r"(first), "r"(call), "r"(second) : "memory");
}
__device__ inline void store_word(uint2* at, uint32_t value, uint32_t call) {
  asm volatile("st.volatile.global.v2.u32 [%0],{%1,%2};" ::"l"(at), "r"(value), "r"(call) : "memory");
}
// Two words that were loaded from `at`, when both have come.
__device__ inline void await_words(uint4& v, const uint2* at, uint32_t call) {
  while (v.y != call || v.w != call) v = load_words(at);
}
// Copies that complete a barrier.
__device__ inline void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void copy_bulk(uint32_t into, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(into), "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ inline void prefetch_bulk(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0],%1;" ::"l"(from), "r"(bytes) : "memory");
}
}  // namespace qwen
