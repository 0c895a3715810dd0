#include "rows.cuh"

#include "device.cuh"

namespace qwen {
namespace {

template <typename T>
__global__ void rms_norm_kernel(const T* x, const T* norm, float eps, T* y, int K) {
  __shared__ float sums[32];
  wait_for_previous();
  let_next_start();
  const T* row = x + size_t(blockIdx.x) * K;
  const float scale = inverse_rms(row, K, eps, sums);
  for (int k = threadIdx.x * 8; k < K; k += blockDim.x * 8) {
    Pack8<T> p, weight;
    p.bits = *reinterpret_cast<const uint4*>(row + k);
    weight.bits = *reinterpret_cast<const uint4*>(norm + k);
#pragma unroll
    for (int i = 0; i < 8; i++) p.item[i] = from_float<T>(to_float(p.item[i]) * scale * to_float(weight.item[i]));
    *reinterpret_cast<uint4*>(y + size_t(blockIdx.x) * K + k) = p.bits;
  }
}

template <typename T>
__global__ void gate_kernel(const T* h, T* y, int N) {
  wait_for_previous();
  let_next_start();
  const int n = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (n >= N) return;
  const T* row = h + size_t(blockIdx.y) * 2 * N + n;
  Pack8<T> a, b;
  a.bits = *reinterpret_cast<const uint4*>(row);
  b.bits = *reinterpret_cast<const uint4*>(row + N);
#pragma unroll
  for (int i = 0; i < 8; i++) a.item[i] = from_float<T>(silu(to_float(a.item[i])) * to_float(b.item[i]));
  *reinterpret_cast<uint4*>(y + size_t(blockIdx.y) * N + n) = a.bits;
}

}  // namespace

template <typename T>
void rms_norm(const T* x, const T* norm, float eps, T* y, int M, int K, cudaStream_t stream) {
  launch(rms_norm_kernel<T>, dim3(M), dim3(128), 0, stream, x, norm, eps, y, K);
}

template <typename T>
void gate(const T* h, T* y, int M, int N, cudaStream_t stream) {
  constexpr int rows = 65535;  // what a grid takes in its second axis
  for (int m = 0; m < M; m += rows)
    launch(gate_kernel<T>, dim3((N / 8 + 127) / 128, min(rows, M - m)), dim3(128), 0, stream, h + size_t(m) * 2 * N, y + size_t(m) * N, N);
}

#define INSTANTIATE(T)                                                                   \
  template void rms_norm<T>(const T*, const T*, float, T*, int, int, cudaStream_t);      \
  template void gate<T>(const T*, T*, int, int, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
