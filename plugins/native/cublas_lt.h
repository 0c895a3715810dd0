// Products by cuBLASLt, found at run time as cuBLAS is (cublas.h): of 16-bit matrices, and of FP8 matrices with a scale for each block, which compute
// capability 9.0 and cuBLAS 12.9 have. Where there is no plan the caller multiplies otherwise.
//
// A kernel of cuBLAS takes 3 to 4 ms of the host before its first launch, and cuBLAS picks another one for most numbers of rows: a prompt of a new
// length waited for one in every kind of product. Here a product has the kernels that suit its classes of rows; any other number of rows takes the
// best of these, or that of its class. So a prompt of each class has loaded all of them.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cublas.h"

namespace qwen {

constexpr int kFp8RowUnit = 4;  // rows of x are a multiple of this

// y [M,N] = x [M,K] w [N,K]^T + residual [M,N], row-major with `stride` elements from row to row of y and residual, of the type `element`; x and w
// are of it, too, or of `fp8`: then K and N are multiples of 128 and 16, M of kFp8RowUnit.
struct LtShape {
  Element element;
  bool fp8;
  int M, N, K, stride;
};

// The numbers of rows whose kernels are used: 2^i and 3 * 2^(i-1) from 16 to kMostClassRows, and from 128 on 9 * 2^(i-3), since a few rows more than
// 2^i are where kernels for 3 * 2^(i-1) are slowest. The runtime reads prompts of these lengths beforehand (prompt_sizes.py).
constexpr int kMostClassRows = 2048;
constexpr bool is_power(int rows) { return (rows & (rows - 1)) == 0; }
constexpr int next_class(int rows) {
  if (is_power(rows)) return rows < 128 ? rows / 2 * 3 : rows / 8 * 9;
  return rows % 9 == 0 && is_power(rows / 9) ? rows / 9 * 12 : rows / 3 * 4;
}

// How cuBLASLt computes a product: `found` false where it cannot.
struct LtPlan {
  bool found = false;
  uint64_t algorithm[8] = {};
  size_t workspace = 0;
};

// The plan for a shape on the current device; made once. `handle` is that of cuBLAS, which is one of cuBLASLt too.
LtPlan lt_plan(void* handle, const LtShape& shape);

// x, w, y and residual begin at multiples of 16 bytes; residual may be y, or null. FP8: codes, with scales [K/128][M] of x and [ceil(N/128)][K/128
// rounded up to 4] of w. Throws std::runtime_error.
void lt_product(void* handle, const LtPlan& plan, const LtShape& shape, const void* x, const float* x_scales, const void* w, const float* w_scales,
                const void* residual, void* y, void* workspace, cudaStream_t stream);

}  // namespace qwen
