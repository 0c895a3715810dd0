// Launches of the vision tower's kernels, and those that go over rows.
#include "picture.cuh"

#include "picture_attention.cuh"

namespace qwen {
namespace {

constexpr int kNormThreads = 128, kNormPacks = 4;

__device__ inline float block_sum(float x, float* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = warp_sum(threadIdx.x % 32 < kNormThreads / 32 ? shared[threadIdx.x % 32] : 0.0f);
  __syncthreads();
  return x;
}

template <typename T>
__global__ void residual_norm_kernel(const T* x, const T* bias, const T* residual, const T* weight, const T* offset, float eps, T* total, T* y,
                                     int K) {
  __shared__ float sums[kNormThreads / 32];
  wait_for_previous();
  let_next_start();
  const size_t row = size_t(blockIdx.x) * K;
  float value[kNormPacks][8], sum = 0.0f;
#pragma unroll
  for (int n = 0; n < kNormPacks; n++) {
    const int k = (n * kNormThreads + int(threadIdx.x)) * 8;
    if (k >= K) break;
    Pack8<T> a, b, c;
    a.bits = *reinterpret_cast<const uint4*>(x + row + k);
    b.bits = *reinterpret_cast<const uint4*>(bias + k);
    c.bits = *reinterpret_cast<const uint4*>(residual + row + k);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      a.item[i] = from_float<T>(to_float(a.item[i]) + to_float(b.item[i]) + to_float(c.item[i]));
      value[n][i] = to_float(a.item[i]);
      sum += value[n][i];
    }
    *reinterpret_cast<uint4*>(total + row + k) = a.bits;
  }
  const float mean = block_sum(sum, sums) / K;
  float squares = 0.0f;
#pragma unroll
  for (int n = 0; n < kNormPacks; n++) {
    if ((n * kNormThreads + int(threadIdx.x)) * 8 >= K) break;
#pragma unroll
    for (int i = 0; i < 8; i++) squares += (value[n][i] - mean) * (value[n][i] - mean);
  }
  const float scale = rsqrtf(block_sum(squares, sums) / K + eps);
#pragma unroll
  for (int n = 0; n < kNormPacks; n++) {
    const int k = (n * kNormThreads + int(threadIdx.x)) * 8;
    if (k >= K) break;
    Pack8<T> a, b, c;
    b.bits = *reinterpret_cast<const uint4*>(weight + k);
    c.bits = *reinterpret_cast<const uint4*>(offset + k);
#pragma unroll
    for (int i = 0; i < 8; i++) a.item[i] = from_float<T>((value[n][i] - mean) * scale * to_float(b.item[i]) + to_float(c.item[i]));
    *reinterpret_cast<uint4*>(y + row + k) = a.bits;
  }
}

// x * sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh u) / 2.
__device__ inline float gelu(float x) { return x / (1.0f + __expf(-1.5957691216f * (x + 0.044715f * x * x * x))); }

template <typename T>
__global__ void bias_gelu_kernel(const T* x, const T* bias, T* y, int N, size_t packs) {
  wait_for_previous();
  let_next_start();
  for (size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x; at < packs; at += size_t(gridDim.x) * blockDim.x) {
    Pack8<T> a, b;
    a.bits = reinterpret_cast<const uint4*>(x)[at];
    b.bits = *reinterpret_cast<const uint4*>(bias + at * 8 % N);
#pragma unroll
    for (int i = 0; i < 8; i++) a.item[i] = from_float<T>(gelu(to_float(a.item[i]) + to_float(b.item[i])));
    reinterpret_cast<uint4*>(y)[at] = a.bits;
  }
}

// Of the device that is current.
struct PictureDevice {
  int major = 0, processors = 0;
  static PictureDevice current() {
    int number = 0;
    PictureDevice device;
    check(cudaGetDevice(&number), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, number), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, number), "cudaDeviceGetAttribute");
    return device;
  }
};

constexpr int blocks_of(int rows, int each) { return (rows + each - 1) / each; }

template <typename Kernel>
void allow(DeviceFlags& allowed, Kernel kernel, int bytes) {
  allowed.once([&] { check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute"); });
}

template <typename T>
void prepare(const PictureShape& s, const T* qkv, const T* bias, const float* cos, const float* sin, T* rows, int P, cudaStream_t stream) {
  launch(picture_prepare<T>, dim3(s.B * s.L), dim3(192), 0, stream, s, qkv, bias, cos, sin, rows, P);
}

template <typename T, int P>
void tiles(const PictureShape& s, const T* rows, float scale, T* y, cudaStream_t stream) {
  static DeviceFlags allowed;
  allow(allowed, picture_attention_tiles<T, P>, kPictureShared<P>);
  const dim3 grid(blocks_of(s.L, kPictureWarps * kRowTile), s.B * s.H);
  launch(picture_attention_tiles<T, P>, grid, dim3(kPictureWarps * 32), kPictureShared<P>, stream, s, rows, scale, y);
}

#ifdef QWEN_SM90A
template <typename T, int STEPS, int FOURS>
void wide_rows(const PictureShape& s, const T* rows, float scale, T* y, cudaStream_t stream) {
  using Wide = PictureWide<STEPS, FOURS>;
  static DeviceFlags allowed;
  allow(allowed, picture_attention_wide<T, STEPS, FOURS>, Wide::kShared);
  launch(picture_attention_wide<T, STEPS, FOURS>, dim3(blocks_of(s.L, Wide::kRows), s.B * s.H), dim3(Wide::kThreads), Wide::kShared, stream, s, rows,
         scale, y);
}

// Blocks of many rows read the keys less often; those of 128 rows are for pictures that give some processors nothing to do otherwise.
template <typename T, int STEPS>
void wide(const PictureShape& s, const T* rows, float scale, T* y, int processors, cudaStream_t stream) {
  constexpr int kMost = STEPS == 4 ? 4 : 3;  // wider heads need more registers
  if (blocks_of(s.L, kMost * 64) * s.B * s.H >= processors) return wide_rows<T, STEPS, kMost>(s, rows, scale, y, stream);
  wide_rows<T, STEPS, 2>(s, rows, scale, y, stream);
}
#endif

}  // namespace

size_t picture_workspace(const PictureShape& s) { return size_t(3) * s.B * s.H * s.L * (s.D <= 64 ? 64 : 128) * 2; }

template <typename T>
void picture_attention(const PictureShape& s, const T* qkv, const T* bias, const float* cos, const float* sin, T* y, void* workspace,
                       cudaStream_t stream) {
  const float scale = 1.44269504f / sqrtf(float(s.D));
  T* rows = static_cast<T*>(workspace);
#ifdef QWEN_SM90A
  const PictureDevice device = PictureDevice::current();
  if (device.major == 9) {
    const int steps = s.D <= 64 ? 4 : s.D <= 80 ? 5 : 8;
    prepare(s, qkv, bias, cos, sin, rows, steps * 16, stream);
    if (steps == 4) return wide<T, 4>(s, rows, scale, y, device.processors, stream);
    if (steps == 5) return wide<T, 5>(s, rows, scale, y, device.processors, stream);
    return wide<T, 8>(s, rows, scale, y, device.processors, stream);
  }
#endif
  prepare(s, qkv, bias, cos, sin, rows, s.D <= 64 ? 64 : 128, stream);
  if (s.D <= 64) return tiles<T, 64>(s, rows, scale, y, stream);
  tiles<T, 128>(s, rows, scale, y, stream);
}

template <typename T>
void residual_norm(const T* x, const T* bias, const T* residual, const T* weight, const T* offset, float eps, T* total, T* y, int M, int K,
                   cudaStream_t stream) {
  launch(residual_norm_kernel<T>, dim3(M), dim3(kNormThreads), 0, stream, x, bias, residual, weight, offset, eps, total, y, K);
}

template <typename T>
void bias_gelu(const T* x, const T* bias, T* y, int M, int N, cudaStream_t stream) {
  const size_t packs = size_t(M) * N / 8;
  const unsigned blocks = unsigned(packs / 256 + 1 < 65536 ? packs / 256 + 1 : 65536);
  launch(bias_gelu_kernel<T>, dim3(blocks), dim3(256), 0, stream, x, bias, y, N, packs);
}

#define INSTANTIATE(T)                                                                                                                     \
  template void picture_attention<T>(const PictureShape&, const T*, const T*, const float*, const float*, T*, void*, cudaStream_t);        \
  template void residual_norm<T>(const T*, const T*, const T*, const T*, const T*, float, T*, T*, int, int, cudaStream_t);                 \
  template void bias_gelu<T>(const T*, const T*, T*, int, int, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
