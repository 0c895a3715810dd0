// What one warp does in attention: 16 rows of queries against a tile of keys and values in shared memory, on tensor cores, with a running
// softmax. Rows of a tile are token * G + head of the group, so that all heads of a group share the keys.
#pragma once

#include "attention.cuh"
#include "device.cuh"
#include "mma.cuh"

namespace qwen {

constexpr int kRowTile = 16;

// Bits by which the 16-byte units of a row are exchanged, so that eight rows of one column lie in different banks.
template <int D>
__device__ inline int exchange(int row) {
  return D >= 64 ? row & 7 : row >> 1 & 3;
}

__device__ inline uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// 16 bytes; zeros instead where `there` is false, and then nothing is read.
__device__ inline void copy_unit(uint32_t shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16,%2;" ::"r"(shared), "l"(global), "r"(there ? 16 : 0) : "memory");
}

__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but the last N groups of copies have arrived.
template <int N>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// `slots` rows of D from `source`, copied by `threads` threads of which this is number `thread`; rows at and behind `there` become zeros.
template <typename T, int D, int SLOTS, int THREADS>
__device__ inline void copy_tile(uint32_t shared, const T* source, int there, int thread) {
  constexpr int kUnits = D / 8, kStep = THREADS / kUnits;  // rows
  static_assert(THREADS % kUnits == 0 && (kStep & (kStep - 1)) == 0, "exchanged bits of a row are those of its step and of its place in it");
  const int first = thread / kUnits, unit = thread % kUnits, exchanged = unit ^ exchange<D>(first);
  // Nothing is read at an address of which no bytes are wanted.
#pragma unroll
  for (int row = 0; row < SLOTS; row += kStep) {
    if (kStep > SLOTS && first >= SLOTS) break;
    copy_unit(shared + (first + row) * D * 2 + ((exchanged ^ exchange<D>(row)) << 4), source + first * D + unit * 8 + row * D, first + row < there);
  }
}

template <bool TRANSPOSED>
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

template <typename T>
__device__ inline uint32_t pair(float a, float b);
template <>
__device__ inline uint32_t pair<__half>(float a, float b) {
  const __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}
template <>
__device__ inline uint32_t pair<__nv_bfloat16>(float a, float b) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}

__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

// Lane 4g+t has rows g and g+8.
template <typename T, int D, int SLOTS>
struct RowTile {
  float o[D / 2];  // four of each column tile, as the tensor core has them
  float largest[2], sum[2];  // of the scores in base 2; `sum` is this lane's part until `finish`
  uint32_t q[D / 16][4];

  // `queries` are 16 rows of D elements, STRIDE from one to the next.
  template <int STRIDE>
  __device__ void begin(const T* queries, int lane) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(queries + lane / 4 * STRIDE + lane % 4 * 2);
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
#pragma unroll
      for (int i = 0; i < 4; i++) q[step][i] = words[((i & 1) * 8 * STRIDE + step * 16 + (i >> 1) * 8) / 2];
    }
#pragma unroll
    for (int j = 0; j < D / 2; j++) o[j] = 0.0f;
    largest[0] = largest[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  // s = q k^T.
  __device__ void scores(float (&s)[SLOTS / 8][4], uint32_t keys, int lane) const {
    const int matrix = lane / 8, row = matrix / 2 * 8 + lane % 8;
    const uint32_t first = keys + row * D * 2 + (((matrix & 1) ^ exchange<D>(row)) << 4);
#pragma unroll
    for (int j = 0; j < SLOTS / 8; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
#pragma unroll
      for (int half = 0; half < SLOTS / 16; half++) {
        uint32_t k[4];
        load_matrices<false>(k, (first ^ (step << 5)) + half * 16 * D * 2);
        multiply<T>(s[half * 2], q[step][0], q[step][1], q[step][2], q[step][3], k[0], k[1]);
        multiply<T>(s[half * 2 + 1], q[step][0], q[step][1], q[step][2], q[step][3], k[2], k[3]);
      }
    }
  }

  // Scores become weights. The row of `half` sees the first visible[half] slots of the tile. `scale` includes log2(e).
  __device__ void weigh(float (&s)[SLOTS / 8][4], const int (&visible)[2], bool all, float scale, int lane) {
    const int column = lane % 4 * 2;
    if (!all) {
#pragma unroll
      for (int j = 0; j < SLOTS / 8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (j * 8 + column + (i & 1) >= visible[i / 2]) s[j][i] = -INFINITY;
      }
    }
    float top[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float most = -INFINITY;
#pragma unroll
      for (int j = 0; j < SLOTS / 8; j++) most = fmaxf(most, fmaxf(s[j][half * 2], s[j][half * 2 + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      top[half] = fmaxf(largest[half], most * scale);
    }
    if (__any_sync(0xffffffffu, top[0] > largest[0] || top[1] > largest[1])) {
      float keep[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        keep[half] = top[half] == -INFINITY ? 1.0f : power_of_two(largest[half] - top[half]);
        largest[half] = top[half], sum[half] *= keep[half];
      }
#pragma unroll
      for (int j = 0; j < D / 2; j++) o[j] *= keep[j % 4 / 2];
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float base = largest[half] == -INFINITY ? 0.0f : largest[half];
#pragma unroll
      for (int j = 0; j < SLOTS / 8; j++) {
        s[j][half * 2] = power_of_two(fmaf(s[j][half * 2], scale, -base));
        s[j][half * 2 + 1] = power_of_two(fmaf(s[j][half * 2 + 1], scale, -base));
        sum[half] += s[j][half * 2] + s[j][half * 2 + 1];
      }
    }
  }

  // o += s v.
  __device__ void add_values(const float (&s)[SLOTS / 8][4], uint32_t values, int lane) {
    const int matrix = lane / 8, row = matrix % 2 * 8 + lane % 8;
    const uint32_t first = values + row * D * 2 + (((matrix / 2) ^ exchange<D>(row)) << 4);
#pragma unroll
    for (int half = 0; half < SLOTS / 16; half++) {
      const uint32_t a0 = pair<T>(s[half * 2][0], s[half * 2][1]), a1 = pair<T>(s[half * 2][2], s[half * 2][3]);
      const uint32_t a2 = pair<T>(s[half * 2 + 1][0], s[half * 2 + 1][1]), a3 = pair<T>(s[half * 2 + 1][2], s[half * 2 + 1][3]);
#pragma unroll
      for (int j = 0; j < D / 16; j++) {
        uint32_t v[4];
        load_matrices<true>(v, (first ^ (j << 5)) + half * 16 * D * 2);
        multiply<T>(reinterpret_cast<float(&)[4]>(o[j * 8]), a0, a1, a2, a3, v[0], v[1]);
        multiply<T>(reinterpret_cast<float(&)[4]>(o[j * 8 + 4]), a0, a1, a2, a3, v[2], v[3]);
      }
    }
  }

  // The sums of the rows become whole.
  __device__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    }
  }
};

// Slots that row `row` of a call sees, from slot `first` on, where the sequence had `length` tokens before.
__device__ inline int visible_slots(int row, int G, int T, int length, int first) { return length + min(row / G, T - 1) + 1 - first; }

__device__ inline float inverse_of(float x) { return __fdividef(1.0f, x); }

__device__ inline float opened(float gate) { return inverse_of(1.0f + __expf(-gate)); }

// y = o * sigmoid(gate) for row `row`, of which this lane has columns 8j + 2 (lane % 4) + 0..1 in o[4j + 2 half + 0..1].
template <typename T, int D>
__device__ inline void write_gated(const AttentionShape& shape, const AttentionTensors<T>& in, int b, int h, int row, int lane,
                                   const float (&o)[D / 2], int half, float factor) {
  const int G = shape.group();
  const size_t token = size_t(b) * shape.T + row / G;
  const int column = (h * G + row % G) * D + lane % 4 * 2;
  const T* gate = in.gate + token * shape.gate_stride + column;
  T* y = in.y + token * shape.Hq * D + column;
  // All are loaded before the first is stored: y might be the gate's memory, as far as the compiler knows.
  union {
    uint32_t bits;
    T item[2];
  } g[D / 8];
#pragma unroll
  for (int j = 0; j < D / 8; j++) g[j].bits = *reinterpret_cast<const uint32_t*>(gate + j * 8);
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    const float a = o[j * 4 + half * 2] * factor * opened(to_float(g[j].item[0])), b = o[j * 4 + half * 2 + 1] * factor * opened(to_float(g[j].item[1]));
    *reinterpret_cast<uint32_t*>(y + j * 8) = pair<T>(a, b);
  }
}

}  // namespace qwen
