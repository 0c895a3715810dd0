// The one function of cuBLAS that is used, where cuBLASLt (cublas_lt.h) has no plan. Found at run time: the library must be the one whose handle the
// execution provider hands out.
#pragma once

#include <cuda_runtime.h>

namespace qwen {

enum class Element { kHalf, kBfloat16 };

// y [M,N] = x [M,K] w [N,K]^T, to which what y has is added where `add`, row-major with `stride` elements from row to row of y, fp32 accumulation.
// Throws std::runtime_error.
void product(void* cublas_handle, Element type, const void* x, const void* w, bool add, void* y, int M, int N, int K, int stride);

}  // namespace qwen
