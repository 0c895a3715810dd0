#include "fp8.cuh"

#include <cuda_fp8.h>

#include "fp8_stream.cuh"
#include "product_few.cuh"

namespace qwen {
namespace {

constexpr float kLargest = 448.0f;

// Eight neighboring values of a row, from k on (a multiple of 8).
template <typename T>
__device__ uint4 eight(const Fp8Matrix& w, int row, int k) {
  const uint2 codes = *reinterpret_cast<const uint2*>(w.codes + size_t(row) * w.stride() + k);
  const float scale = w.scales[size_t(row >> w.log_rows) * w.scale_stride() + k / kScaleColumns];
  const uint32_t pairs[4] = {fp8_pair<__half, false>(codes.x), fp8_pair<__half, true>(codes.x), fp8_pair<__half, false>(codes.y), fp8_pair<__half, true>(codes.y)};
  Pack8<T> values;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 two = __half22float2(*reinterpret_cast<const __half2*>(pairs + i));
    values.item[2 * i] = from_float<T>(two.x * scale), values.item[2 * i + 1] = from_float<T>(two.y * scale);
  }
  return values.bits;
}

// Neighboring threads take neighboring k.
template <typename T>
__global__ void fp8_dequantize_kernel(Fp8Matrix w, int first_row, int rows, T* out) {
  wait_for_previous();
  let_next_start();
  const int k = (blockIdx.y * blockDim.x + threadIdx.x) * 8, row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row < rows && k < w.K) *reinterpret_cast<uint4*>(out + size_t(row) * w.K + k) = eight<T>(w, first_row + row, k);
}

template <typename T>
__global__ void fp8_gather_kernel(Fp8Matrix w, const int64_t* ids, T* y) {
  wait_for_previous();
  let_next_start();
  const int64_t id = ids[blockIdx.x];
  for (int k = threadIdx.x * 8; k < w.K; k += blockDim.x * 8)
    *reinterpret_cast<uint4*>(y + size_t(blockIdx.x) * w.K + k) = id >= 0 && id < w.N ? eight<T>(w, int(id), k) : make_uint4(0, 0, 0, 0);
}

// Sixteen lanes make the codes of 128 k of a row.
template <typename T>
__global__ void fp8_activations_kernel(const T* x, int M, int padded, int K, uint8_t* codes, float* scales) {
  wait_for_previous();
  let_next_start();
  constexpr int kLanes = kScaleColumns / 8;
  const int m = blockIdx.x, block = blockIdx.y * (blockDim.x / kLanes) + threadIdx.x / kLanes, k = block * kScaleColumns + threadIdx.x % kLanes * 8;
  const bool there = m < M && k < K;
  Pack8<T> values;
  values.bits = there ? *reinterpret_cast<const uint4*>(x + size_t(m) * K + k) : make_uint4(0, 0, 0, 0);
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(to_float(values.item[i])));
#pragma unroll
  for (int step = kLanes / 2; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  // Of a block of zeros any scale will do.
  const float scale = largest > 0.0f ? largest / kLargest : 1.0f, inverse = 1.0f / scale;
  if (k >= K) return;
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 two = make_float2(to_float(values.item[2 * i]) * inverse, to_float(values.item[2 * i + 1]) * inverse);
    words[i / 2] |= uint32_t(__nv_cvt_float2_to_fp8x2(two, __NV_SATFINITE, __NV_E4M3)) << (i % 2 * 16);
  }
  *reinterpret_cast<uint2*>(codes + size_t(m) * K + k) = make_uint2(words[0], words[1]);
  if (threadIdx.x % kLanes == 0) scales[size_t(block) * padded + m] = scale;
}

template <typename T, bool SWIGLU>
void few_rows(const FewProduct<Fp8Matrix>& given, cudaStream_t stream) {
  product_few<T, Fp8Stream, SWIGLU>(given, stream);
}

}  // namespace

template <typename T>
void fp8_linear(const Fp8Matrix& w, const T* x, const T* tail, int tail_rows, const T* residual, const T* norm, float eps, T* y, int M, cudaStream_t stream,
                T* normed) {
  few_rows<T, false>(FewProduct<Fp8Matrix>{w, x, tail, residual, norm, y, eps, M, w.N, tail_rows, 0, 0, normed}, stream);
}

template <typename T>
void fp8_swiglu(const Fp8Matrix& w, const T* x, const T* norm, float eps, T* y, int M, cudaStream_t stream, T* normed) {
  few_rows<T, true>(FewProduct<Fp8Matrix>{w, x, nullptr, nullptr, norm, y, eps, M, w.N / 2, 0, 0, 0, normed}, stream);
}

template <typename T>
void fp8_dequantize(const Fp8Matrix& w, int first_row, int rows, T* out, cudaStream_t stream) {
  const dim3 threads(64, 4);
  launch(fp8_dequantize_kernel<T>, dim3((rows + threads.y - 1) / threads.y, (w.K / 8 + threads.x - 1) / threads.x), threads, 0, stream, w, first_row, rows, out);
}

template <typename T>
void fp8_gather(const Fp8Matrix& w, const int64_t* ids, T* y, int count, cudaStream_t stream) {
  launch(fp8_gather_kernel<T>, dim3(count), dim3(128), 0, stream, w, ids, y);
}

template <typename T>
void fp8_activations(const T* x, int M, int padded, int K, uint8_t* codes, float* scales, cudaStream_t stream) {
  constexpr int kThreads = 256, kBlocks = kThreads * 8 / kScaleColumns;
  const int blocks = (K / kScaleColumns + kBlocks - 1) / kBlocks;
  launch(fp8_activations_kernel<T>, dim3(padded, blocks), dim3(kThreads), 0, stream, x, M, padded, K, codes, scales);
}

#define INSTANTIATE(T)                                                                                                              \
  template void fp8_linear<T>(const Fp8Matrix&, const T*, const T*, int, const T*, const T*, float, T*, int, cudaStream_t, T*);         \
  template void fp8_swiglu<T>(const Fp8Matrix&, const T*, const T*, float, T*, int, cudaStream_t, T*);                                  \
  template void fp8_dequantize<T>(const Fp8Matrix&, int, int, T*, cudaStream_t);                                                    \
  template void fp8_gather<T>(const Fp8Matrix&, const int64_t*, T*, int, cudaStream_t);                                             \
  template void fp8_activations<T>(const T*, int, int, int, uint8_t*, float*, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
