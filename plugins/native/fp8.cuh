// Products with matrices of FP8 (E4M3) codes, as the block FP8 releases store them: row after row, with a scale for each block.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "panel_rows.cuh"

namespace qwen {

constexpr int kScaleColumns = 128;  // k that share a scale

// Sixteen rows of a matrix.
struct Fp8Panel {
  const uint8_t* codes;  // of the first row of the matrix
  const float* scales;
  int row;  // the first of the sixteen; there may be fewer
};

// w[n,k] = code[n,k] * scales[n / rows][k / 128], w [N,K]. `rows` is 2 to the power of log_rows, at most 128. K is a multiple of 8; a row of codes is
// filled up with zeros to `stride` bytes, a row of scales to `scale_stride` numbers (which is how cuBLASLt reads them). No code is NaN.
struct Fp8Matrix {
  using Panel = Fp8Panel;

  const uint8_t* codes = nullptr;
  const float* scales = nullptr;
  int N = 0, K = 0, log_rows = 0;

  __host__ __device__ int panels() const { return (N + kPanelRows - 1) / kPanelRows; }
  __host__ __device__ int units() const { return (K + kScaleColumns - 1) / kScaleColumns; }
  __host__ __device__ int stride() const { return (K + 15) / 16 * 16; }
  __host__ __device__ int scale_stride() const { return (units() + 3) / 4 * 4; }
  __host__ __device__ int scale_rows() const { return ((N - 1) >> log_rows) + 1; }
  __host__ __device__ Panel panel(int index) const { return {codes, scales, index * kPanelRows}; }
  // The matrix `e` of several that follow each other.
  __host__ __device__ Fp8Matrix expert(int e) const {
    Fp8Matrix own = *this;
    own.codes += size_t(e) * N * stride();
    own.scales += size_t(e) * scale_rows() * scale_stride();
    return own;
  }
};

// y = norm(x) [w; tail]^T + residual for M <= 8, as quant_linear: codes are multiplied as they are, and their sum of 128 k by its scale in fp32.
template <typename T>
void fp8_linear(const Fp8Matrix& w, const T* x, const T* tail, int tail_rows, const T* residual, const T* norm, float eps, T* y, int M, cudaStream_t stream,
                T* normed = nullptr);

// y = silu(h g^T) * (h u^T),  h = norm(x), for M <= 8.   w = [g; u], [2N,K] with N a multiple of 16   y [M,N]
template <typename T>
void fp8_swiglu(const Fp8Matrix& w, const T* x, const T* norm, float eps, T* y, int M, cudaStream_t stream, T* normed = nullptr);

// Rows first_row to first_row + rows - 1 of w, in T: out [rows,K].
template <typename T>
void fp8_dequantize(const Fp8Matrix& w, int first_row, int rows, T* out, cudaStream_t stream);

// y[i] = w[ids[i]]; zeros for an id outside of 0..N-1.   y [count,K]
template <typename T>
void fp8_gather(const Fp8Matrix& w, const int64_t* ids, T* y, int count, cudaStream_t stream);

// Activations as FP8: x [M,K] -> codes [padded,K], scales [K/128][padded], the largest magnitude of 128 k / 448. Rows from M on are zeros.
// K is a multiple of 128.
template <typename T>
void fp8_activations(const T* x, int M, int padded, int K, uint8_t* codes, float* scales, cudaStream_t stream);

}  // namespace qwen
