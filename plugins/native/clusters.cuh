// What kernels of compute capability 9.0 tell each other in shared memory: barriers that copies complete, clusters of blocks that read each other's
// memory, and registers that some warps hand to others.
#pragma once

#include <cstdint>

namespace qwen {

__device__ inline uint32_t shared_of(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

__device__ inline void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory"); }
// This thread arrives when all copies that it has begun are complete.
__device__ inline void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
// This thread arrives, and the barrier waits for copies of so many bytes as well.
__device__ inline void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// A multiple of 16 bytes between multiples of 16.
__device__ inline void copy_bulk(uint32_t into, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(into), "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ inline bool barrier_passed(uint32_t barrier, int parity) {
  int passed;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0,1,0,p;}" : "=r"(passed) : "r"(barrier), "r"(parity) : "memory");
  return passed;
}
__device__ inline void barrier_wait(uint32_t barrier, int parity) {
  while (!barrier_passed(barrier, parity)) {
  }
}

__device__ inline void store_shared(uint32_t shared, const float4& v) {
  asm volatile("st.shared.v4.f32 [%0],{%1,%2,%3,%4};" ::"r"(shared), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What the block `rank` of the cluster has at the same place of its shared memory.
__device__ inline float4 load_remote(uint32_t shared, int rank) {
  float4 v;
  asm volatile("{.reg .b32 at; mapa.shared::cluster.u32 at, %4, %5; ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [at];}"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(shared), "r"(rank)
               : "memory");
  return v;
}

// All warps of a group of four.
template <int REGISTERS>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

}  // namespace qwen
