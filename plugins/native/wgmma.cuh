// Products of four warps on the tensor cores of compute capability 9.0, which read shared memory themselves.
//
// A matrix is stored in blocks of 64 columns; a row of a block is 128 bytes, in which the 16-byte units are exchanged by the row's number.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "check.h"

namespace qwen {

// Whether kernels with these products are there and the current device, of several that may differ, has what they need.
inline bool has_tensor_cores_90() {
#ifdef QWEN_SM90A
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  return major == 9;
#else
  return false;
#endif
}

// Where unit `unit` (8 elements) of row `row` is, in a matrix of `rows` rows.
__device__ inline uint32_t swizzled(int row, int unit, int rows) { return unit / 8 * rows * 128 + row * 128 + ((unit % 8 ^ row % 8) << 4); }

// `next_block`: bytes from a block of 64 columns to the next, where the product's own columns are in several.
__device__ inline uint64_t matrix_of(uint32_t shared, uint32_t next_block) {
  return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(next_block >> 4) << 16 | (shared & 0x3ffff) >> 4;
}

// What was written to shared memory by copies becomes visible to the products.
__device__ inline void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Registers of a product that is complete only now: nothing of them may be read earlier.
template <int N>
__device__ inline void settle(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
__device__ inline void settle(uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}

// c [64,64] = a b^T, or += where `add`: a [64,16] and b [64,16] in shared memory.
template <typename T>
__device__ void product_64(float (&c)[32], uint64_t a, uint64_t b, int add);
// c [64,2C] += a b: a [64,16] in registers, as mma takes it; b [16,2C] in shared memory. C is 32, 64 or 128.
template <typename T, int C>
__device__ void product_values(float (&c)[C], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b);

// c [64,2C] += a b^T: a [64,16] in registers, as mma takes it; b [2C,16] in shared memory. C is 8, 16, 32, 48, 64, 80, 96, 112 or 128.
template <typename T, int C>
__device__ void product_rows(float (&c)[C], const uint32_t* a, uint64_t b);

// The names of a product's sums in its text, and the sums.
#define QWEN_NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define QWEN_NAMES_16 QWEN_NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define QWEN_NAMES_32 \
  QWEN_NAMES_16 "," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QWEN_NAMES_64 \
  QWEN_NAMES_32 "," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QWEN_NAMES_80 \
  QWEN_NAMES_64 "," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define QWEN_NAMES_96 \
  QWEN_NAMES_80 "," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define QWEN_NAMES_112 \
  QWEN_NAMES_96 "," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define QWEN_NAMES_128 \
  QWEN_NAMES_112 "," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define QWEN_SUMS_8(i) \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define QWEN_SUMS_16(i) QWEN_SUMS_8(i), QWEN_SUMS_8(i + 8)
#define QWEN_SUMS_32(i) QWEN_SUMS_16(i), QWEN_SUMS_16(i + 16)
#define QWEN_SUMS_48(i) QWEN_SUMS_32(i), QWEN_SUMS_16(i + 32)
#define QWEN_SUMS_64(i) QWEN_SUMS_32(i), QWEN_SUMS_32(i + 32)
#define QWEN_SUMS_80(i) QWEN_SUMS_64(i), QWEN_SUMS_16(i + 64)
#define QWEN_SUMS_96(i) QWEN_SUMS_64(i), QWEN_SUMS_32(i + 64)
#define QWEN_SUMS_112(i) QWEN_SUMS_64(i), QWEN_SUMS_48(i + 64)
#define QWEN_SUMS_128(i) QWEN_SUMS_64(i), QWEN_SUMS_64(i + 64)

#define QWEN_SCORES(T, TYPE) \
template <> \
__device__ inline void product_64<T>(float (&c)[32], uint64_t a, uint64_t b, int add) { \
  asm volatile( \
      "{.reg .pred p; setp.ne.b32 p,%34,0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" QWEN_NAMES_32 "},%32,%33,p,1,1,0,0;}" \
      : QWEN_SUMS_32(0) : "l"(a), "l"(b), "r"(add)); \
}
// N columns, of which a thread has C sums; A0 to A3 and B name what follows them.
#define QWEN_VALUES(T, TYPE, N, C, A0, A1, A2, A3, B) \
template <> \
__device__ inline void product_values<T, C>(float (&c)[C], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) { \
  asm volatile( \
      "{.reg .pred p; setp.ne.b32 p,1,0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" QWEN_NAMES_##C "},{" \
      A0 "," A1 "," A2 "," A3 "}," B ",p,1,1,1;}" \
      : QWEN_SUMS_##C(0) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b)); \
}
#define QWEN_ROWS(T, TYPE, N, C, A0, A1, A2, A3, B) \
template <> \
__device__ inline void product_rows<T, C>(float (&c)[C], const uint32_t* a, uint64_t b) { \
  asm volatile( \
      "{.reg .pred p; setp.ne.b32 p,1,0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" QWEN_NAMES_##C "},{" \
      A0 "," A1 "," A2 "," A3 "}," B ",p,1,1,0;}" \
      : QWEN_SUMS_##C(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
}
#define QWEN_PRODUCTS(T, TYPE) \
  QWEN_SCORES(T, TYPE) \
  QWEN_ROWS(T, TYPE, "16", 8, "%8", "%9", "%10", "%11", "%12") \
  QWEN_ROWS(T, TYPE, "32", 16, "%16", "%17", "%18", "%19", "%20") \
  QWEN_ROWS(T, TYPE, "64", 32, "%32", "%33", "%34", "%35", "%36") \
  QWEN_ROWS(T, TYPE, "128", 64, "%64", "%65", "%66", "%67", "%68") \
  QWEN_ROWS(T, TYPE, "160", 80, "%80", "%81", "%82", "%83", "%84") \
  QWEN_ROWS(T, TYPE, "192", 96, "%96", "%97", "%98", "%99", "%100") \
  QWEN_ROWS(T, TYPE, "224", 112, "%112", "%113", "%114", "%115", "%116") \
  QWEN_ROWS(T, TYPE, "256", 128, "%128", "%129", "%130", "%131", "%132") \
  QWEN_VALUES(T, TYPE, "64", 32, "%32", "%33", "%34", "%35", "%36") \
  QWEN_VALUES(T, TYPE, "128", 64, "%64", "%65", "%66", "%67", "%68") \
  QWEN_VALUES(T, TYPE, "256", 128, "%128", "%129", "%130", "%131", "%132")

QWEN_PRODUCTS(__half, "f16")
QWEN_PRODUCTS(__nv_bfloat16, "bf16")
#undef QWEN_PRODUCTS
#undef QWEN_ROWS
#undef QWEN_VALUES
#undef QWEN_SCORES
#undef QWEN_SUMS_128
#undef QWEN_SUMS_112
#undef QWEN_SUMS_96
#undef QWEN_SUMS_80
#undef QWEN_SUMS_64
#undef QWEN_SUMS_48
#undef QWEN_SUMS_32
#undef QWEN_SUMS_16
#undef QWEN_SUMS_8
#undef QWEN_NAMES_128
#undef QWEN_NAMES_112
#undef QWEN_NAMES_96
#undef QWEN_NAMES_80
#undef QWEN_NAMES_64
#undef QWEN_NAMES_32
#undef QWEN_NAMES_16
#undef QWEN_NAMES_8

}  // namespace qwen
