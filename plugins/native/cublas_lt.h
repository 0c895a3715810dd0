// Products of FP8 matrices with a scale for each block, by cuBLASLt, found at run time as cuBLAS is (cublas.h). Compute capability 9.0 and
// cuBLAS 12.9 have them; elsewhere there is no plan, and the caller multiplies otherwise.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cublas.h"

namespace qwen {

constexpr int kFp8RowUnit = 4;  // rows of x are a multiple of this

// y [M,N] = x [M,K] w [N,K]^T + beta * y, row-major with `stride` elements from row to row of y, of the type `element`. K and N are multiples
// of 128 and 16, M of kFp8RowUnit.
struct Fp8Shape {
  Element element;
  int M, N, K, stride;
};

// How cuBLASLt would compute a product: `found` false where it cannot.
struct Fp8Plan {
  bool found = false;
  uint64_t algorithm[8] = {};
  size_t workspace = 0;
};

// The plan for a shape on the current device; made once. `handle` is that of cuBLAS, which is one of cuBLASLt too.
Fp8Plan fp8_plan(void* handle, const Fp8Shape& shape);

// x: codes [M,K] with scales [K/128][M]; w: codes [N,K] with scales [ceil(N/128)][K/128 rounded up to 4]. Throws std::runtime_error.
void fp8_product(void* handle, const Fp8Plan& plan, const Fp8Shape& shape, const uint8_t* x, const float* x_scales, const uint8_t* w,
                 const float* w_scales, float beta, void* y, void* workspace, cudaStream_t stream);

}  // namespace qwen
