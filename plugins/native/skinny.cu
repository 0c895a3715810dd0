// The tensor cores do the arithmetic: 8 weight rows times up to 8 activation rows are half of one m16n8k16 product, so that the cost does not
// depend on M. A dot product may visit k in any order: each lane loads 8 neighboring k of its weight row (16 bytes) and the same 8 of its
// activation row, and hands them to the instruction as if they were the k of its layout.
//
// The warps of a block split K; their partial sums meet in shared memory. Weights do not depend on the previous kernel, so the first loads
// are issued before it has finished.

#include "skinny.cuh"

#include "device.cuh"
#include "mma.cuh"
#include "resident_few.cuh"

namespace qwen {
namespace {

constexpr int kTile = 8;      // weight rows that one half of the instruction's A operand holds
constexpr int kMaxWarps = 16;

// Weights are read once: they pass by the first-level cache.
__device__ inline uint4 load_weight(const void* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}

// HALVES = 2: both halves of the A operand carry weight rows, 8 rows apart (Linear) or the gate and the up row (SwiGlu).
template <typename T, int HALVES, bool NORM, bool SWIGLU>
__global__ void __launch_bounds__(kMaxWarps * 32, 2) skinny_kernel(
    const T* x, const T* w, const T* residual, const T* norm, float eps, T* y, int M, int N, int K) {
  constexpr int U = 4 / HALVES;  // steps per group of loads
  constexpr int kRows = SWIGLU ? kTile : kTile * HALVES;
  __shared__ float partial[kMaxWarps][HALVES * kTile * kSkinnyRows];
  __shared__ float inverse[kSkinnyRows];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * kRows, steps = (K + kStep - 1) / kStep;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  const T* row[HALVES];
  bool have[HALVES];
  row[0] = w + size_t(first_row + g) * K + t * 8;
  have[0] = true;
  if constexpr (HALVES == 2) {
    row[1] = row[0] + size_t(SWIGLU ? N : kTile) * K;
    have[1] = SWIGLU || first_row + kTile + g < N;
  }

  auto load_group = [&](uint4 (&into)[U][HALVES], int step) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int k = (step + u * warps) * kStep;
#pragma unroll
      for (int h = 0; h < HALVES; h++) into[u][h] = have[h] && k + t * 8 < K ? load_weight(row[h] + k) : zero;
    }
  };

  uint4 now[U][HALVES], next[U][HALVES];
  load_group(now, warp);
  wait_for_previous();
  let_next_start();

  float added = 0.0f;  // the residual of the one output that this thread will write
  const int m_out = threadIdx.x / kRows, n_out = first_row + threadIdx.x % kRows;
  const bool writes = m_out < M && n_out < N;
  if (!SWIGLU && residual != nullptr && writes) added = to_float(residual[size_t(m_out) * N + n_out]);

  if constexpr (NORM) {
    for (int m = warp; m < M; m += warps) {
      float sum = 0.0f;
      for (int k = lane * 8; k < K; k += 256) {
        Pack8<T> p;
        p.bits = *reinterpret_cast<const uint4*>(x + size_t(m) * K + k);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += to_float(p.item[i]) * to_float(p.item[i]);
      }
      sum = warp_sum(sum);
      if (lane == 0) inverse[m] = rsqrtf(sum / K + eps);
    }
    __syncthreads();
  }
  const float scale = NORM && g < M ? inverse[g] : 1.0f;

  float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int step = warp; step < steps; step += U * warps) {
    load_group(next, step + U * warps);
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int k = (step + u * warps) * kStep + t * 8;
      Pack8<T> b;
      b.bits = zero;
      if (g < M && k < K) {
        b.bits = *reinterpret_cast<const uint4*>(x + size_t(g) * K + k);
        if constexpr (NORM) {
          Pack8<T> weight;
          weight.bits = *reinterpret_cast<const uint4*>(norm + k);
#pragma unroll
          for (int i = 0; i < 8; i++) b.item[i] = from_float<T>(to_float(b.item[i]) * scale * to_float(weight.item[i]));
        }
      }
      const uint4 a = now[u][0], d = HALVES == 2 ? now[u][HALVES - 1] : zero;
      multiply<T>(c, a.x, d.x, a.y, d.y, b.bits.x, b.bits.y);
      multiply<T>(c, a.z, d.z, a.w, d.w, b.bits.z, b.bits.w);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
#pragma unroll
      for (int h = 0; h < HALVES; h++) now[u][h] = next[u][h];
    }
  }

  // c[0], c[1]: weight row g with activation rows 2t, 2t+1; c[2], c[3]: the same of the second half.
#pragma unroll
  for (int i = 0; i < 2 * HALVES; i++) partial[warp][(i / 2) * 64 + (2 * t + i % 2) * 8 + g] = c[i];
  __syncthreads();
  if (!writes) return;
  auto total = [&](int index) {
    float sum = 0.0f;
    for (int i = 0; i < warps; i++) sum += partial[i][index];
    return sum;
  };
  const int r = threadIdx.x % kRows;
  float out;
  if constexpr (SWIGLU) {
    out = silu(total(m_out * 8 + r)) * total(64 + m_out * 8 + r);
  } else {
    out = total((r / 8) * 64 + m_out * 8 + r % 8) + added;
  }
  y[size_t(m_out) * N + n_out] = from_float<T>(out);
}

template <typename T, int HALVES, bool SWIGLU>
void run(const T* x, const T* w, const T* residual, const T* norm, float eps, T* y, int M, int N, int K, int warps, cudaStream_t stream) {
  constexpr int rows = SWIGLU ? kTile : kTile * HALVES;
  const dim3 grid((N + rows - 1) / rows), block(warps * 32);
  if (norm != nullptr)
    launch(skinny_kernel<T, HALVES, true, SWIGLU>, grid, block, 0, stream, x, w, residual, norm, eps, y, M, N, K);
  else
    launch(skinny_kernel<T, HALVES, false, SWIGLU>, grid, block, 0, stream, x, w, residual, norm, eps, y, M, N, K);
}

// Few blocks need more warps each to keep as many loads in flight. Both bounds: measured on an H200.
int warps_for(int tiles, int K) {
  const int steps = (K + kStep - 1) / kStep;
  return tiles <= 300 && steps >= 2 * kMaxWarps ? kMaxWarps : kMaxWarps / 2;
}

constexpr int kPlainUnit = 64;

template <typename T>
void resident(const T* x, const T* w, const T* residual, const T* norm, float eps, T* y, int M, int N, int rows, int K, cudaStream_t stream) {
  const PlainMatrix<T, kPlainUnit> matrix{w, rows, K};
  resident_few<PlainPanels<T, kPlainUnit>>({matrix, x, nullptr, residual, norm, y, eps, M, N, 0, 0, 0}, rows != N, stream);
}

}  // namespace

template <typename T>
void skinny_linear(const T* x, const T* w, const T* residual, const T* norm, float eps, T* y, int M, int N, int K, cudaStream_t stream) {
  if (resident_is_better<PlainPanels<T, kPlainUnit>>(N, K)) return resident(x, w, residual, norm, eps, y, M, N, N, K, stream);
  const int tiles = N / kTile;
  if (tiles <= 528)
    run<T, 1, false>(x, w, residual, norm, eps, y, M, N, K, warps_for(tiles, K), stream);
  else
    run<T, 2, false>(x, w, residual, norm, eps, y, M, N, K, kMaxWarps / 2, stream);
}

template <typename T>
void skinny_swiglu(const T* x, const T* w, const T* norm, float eps, T* y, int M, int N, int K, cudaStream_t stream) {
  if (resident_is_better<PlainPanels<T, kPlainUnit>>(N, K)) return resident<T>(x, w, nullptr, norm, eps, y, M, N, 2 * N, K, stream);
  run<T, 2, true>(x, w, nullptr, norm, eps, y, M, N, K, warps_for(N / kTile, K), stream);
}

#define INSTANTIATE(T)                                                                                                       \
  template void skinny_linear<T>(const T*, const T*, const T*, const T*, float, T*, int, int, int, cudaStream_t);             \
  template void skinny_swiglu<T>(const T*, const T*, const T*, float, T*, int, int, int, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
