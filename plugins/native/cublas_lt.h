// Products by cuBLASLt, found at run time as cuBLAS is (cublas.h): of 16-bit matrices, and of FP8 matrices with a scale for each block, which compute
// capability 9.0 and cuBLAS 12.9 have. Where there is no plan the caller multiplies otherwise.
//
// A kernel of cuBLAS takes 3 to 4 ms of the host before its first launch, and cuBLAS picks another one for most numbers of rows: a prompt of a new
// length waited for one in every kind of product. Here a product has the kernels that suit its classes of rows, which a prompt of each class has
// loaded, and any other number of rows takes the best algorithm of a few that has one of these; only where none of the few has, another one.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cublas.h"

namespace qwen {

constexpr int kFp8RowUnit = 4;  // rows of x are a multiple of this

// y [M,N] = x [M,K] w [N,K]^T + beta * y, row-major with `stride` elements from row to row of y, of the type `element`; x and w are of it, too, or of
// `fp8`: then K and N are multiples of 128 and 16, M of kFp8RowUnit.
struct LtShape {
  Element element;
  bool fp8;
  int M, N, K, stride;
};

// The numbers of rows whose kernels are used: 16, 24, 32, 48, ..., 2^i and 3 * 2^(i-1) up to kMostClassRows. The runtime reads prompts of these
// lengths beforehand (prompt_sizes.py).
constexpr int kMostClassRows = 2048;
constexpr int next_class(int rows) { return rows & (rows - 1) ? rows / 3 * 4 : rows / 2 * 3; }

// How cuBLASLt computes a product: `found` false where it cannot.
struct LtPlan {
  bool found = false;
  uint64_t algorithm[8] = {};
  size_t workspace = 0;
};

// The plan for a shape on the current device; made once. `handle` is that of cuBLAS, which is one of cuBLASLt too.
LtPlan lt_plan(void* handle, const LtShape& shape);

// x and w begin at multiples of 16 bytes, y, too. FP8: codes, with scales [K/128][M] of x and [ceil(N/128)][K/128 rounded up to 4] of w. Throws
// std::runtime_error.
void lt_product(void* handle, const LtPlan& plan, const LtShape& shape, const void* x, const float* x_scales, const void* w, const float* w_scales,
                float beta, void* y, void* workspace, cudaStream_t stream);

}  // namespace qwen
