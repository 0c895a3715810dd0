// Products with quantized matrices, in the layout of cpu/quant.h: panels of 16 rows, groups of 4 blocks, scales beside their codes.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "panel_rows.cuh"

namespace qwen {

constexpr int kGroupBlocks = 4;  // blocks whose scales are stored together

// w[n,k] = scale * (code - zero), w [N,K]: a scale, and where there are `zeros` a zero, per row and block; else the zero is 2^(bits-1).
// `packed` may have more rows than N. K is a multiple of 8, `block` 32, 64 or 128.
struct QuantMatrix {
  using Panel = const uint8_t*;

  const uint8_t* packed = nullptr;
  int bits = 0, block = 0, N = 0, K = 0;
  bool zeros = false;
  bool wide_scales = false;  // fp32 instead of fp16

  __host__ __device__ int panels() const { return (N + kPanelRows - 1) / kPanelRows; }
  __host__ __device__ int log_block() const { return block == 32 ? 5 : block == 64 ? 6 : 7; }  // divisions take kernels of few rows a while
  __host__ __device__ int blocks() const { return (K + block - 1) >> log_block(); }
  __host__ __device__ int padded() const { return blocks() << log_block(); }
  __host__ __device__ int scale_bytes() const { return wide_scales ? 4 : 2; }
  __host__ __device__ int zeros_at() const { return kGroupBlocks * kPanelRows * scale_bytes(); }  // in a group
  __host__ __device__ int codes_at() const { return zeros_at() + (zeros ? kGroupBlocks * kPanelRows : 0); }
  __host__ __device__ int block_bytes() const { return block * kPanelRows * bits / 8; }
  __host__ __device__ int group_bytes() const { return codes_at() + kGroupBlocks * block_bytes(); }
  __host__ __device__ int panel_bytes() const {
    return (blocks() + kGroupBlocks - 1) / kGroupBlocks * codes_at() + blocks() * block_bytes();
  }
  __host__ __device__ int units() const { return (padded() + 127) / 128; }
  __host__ __device__ Panel panel(int index) const { return packed + size_t(index) * panel_bytes(); }
  // The matrix `e` of several that follow each other.
  __host__ __device__ QuantMatrix expert(int e) const {
    QuantMatrix own = *this;
    own.packed += size_t(e) * bytes();
    return own;
  }
  __host__ __device__ size_t bytes() const { return size_t(panels()) * panel_bytes(); }
};

// y = norm(x) [w; tail]^T + residual for M <= 8.   x [M,K]  tail [tail_rows,K]  residual, y [M,N+tail_rows]  norm [K]; tail, residual and
// norm may be null. norm(x) = x / sqrt(mean(x^2) + eps) * norm, rounded to T. tail_rows is a multiple of 8. The codes are multiplied as
// integers and their sum of a block in fp32 by its scale: no weight is rounded. `normed` [M,K], or null, is memory for norm(x): several rows are faster
// with it, and have the same bits.
template <typename T>
void quant_linear(const QuantMatrix& w, const T* x, const T* tail, int tail_rows, const T* residual, const T* norm, float eps, T* y, int M, cudaStream_t stream,
                  T* normed = nullptr);

// y = silu(h g^T) * (h u^T),  h = norm(x), for M <= 8.   w = [g; u], [2N,K] with N a multiple of 16   y [M,N]
template <typename T>
void quant_swiglu(const QuantMatrix& w, const T* x, const T* norm, float eps, T* y, int M, cudaStream_t stream, T* normed = nullptr);

// From 9 rows on, on compute capability 9.0: the same products of M rows in one launch for the activations, which are arranged in `workspace`
// (many_workspace bytes), and one for the weights, which are rounded to T as by `dequantize`. Of each range of rows (9 to 64, 65 to 128, 129 to 256) a row
// has the same bits beside any others; of more rows the order of sums depends on their number. `has_quant_many`: whether that is there and better than products with a copy of the weights.
template <typename T>
bool has_quant_many(const QuantMatrix& w, int M);
size_t many_workspace(const QuantMatrix& w, int M);
template <typename T>
void quant_linear_many(const QuantMatrix& w, const T* x, const T* tail, int tail_rows, const T* residual, const T* norm, float eps, T* y, int M, void* workspace,
                       cudaStream_t stream);
template <typename T>
void quant_swiglu_many(const QuantMatrix& w, const T* x, const T* norm, float eps, T* y, int M, void* workspace, cudaStream_t stream);

// Rows first_panel * 16 to first_panel * 16 + rows - 1 of w, in T: out [rows,K].
template <typename T>
void dequantize(const QuantMatrix& w, int first_panel, int rows, T* out, cudaStream_t stream);

// y[i] = w[ids[i]]; zeros for an id outside of 0..N-1.   y [count,K]
template <typename T>
void quant_gather(const QuantMatrix& w, const int64_t* ids, T* y, int count, cudaStream_t stream);

}  // namespace qwen
