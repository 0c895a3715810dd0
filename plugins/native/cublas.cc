#include "cublas.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace qwen {
namespace {

// As in cublas_api.h and library_types.h, whose values are part of the binary interface.
using GemmEx = int (*)(void* handle, int transa, int transb, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
                       const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute_type, int algorithm);
constexpr int kTransposed = 1, kPlain = 0;  // CUBLAS_OP_T, CUBLAS_OP_N
constexpr int kHalf = 2, kBfloat16 = 14;    // CUDA_R_16F, CUDA_R_16BF
constexpr int kCompute32 = 68;              // CUBLAS_COMPUTE_32F
constexpr int kDefaultAlgorithm = -1;       // CUBLAS_GEMM_DEFAULT

GemmEx find() {
  for (const char* name : {"libcublas.so.13", "libcublas.so.12"}) {
    if (void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) {
      if (void* symbol = dlsym(library, "cublasGemmEx")) return reinterpret_cast<GemmEx>(symbol);
    }
  }
  throw std::runtime_error("no cuBLAS 12 or 13 is loaded in this process");
}

}  // namespace

void product(void* handle, Element type, const void* x, const void* w, bool add, void* y, int M, int N, int K, int stride) {
  static const GemmEx gemm = find();
  const float one = 1.0f, beta = add ? 1.0f : 0.0f;
  const int element = type == Element::kHalf ? kHalf : kBfloat16;
  // cuBLAS counts columns first: y^T [N,M] = (w^T)^T x^T.
  const int status = gemm(handle, kTransposed, kPlain, N, M, K, &one, w, element, K, x, element, K, &beta, y, element, stride, kCompute32, kDefaultAlgorithm);
  if (status != 0) throw std::runtime_error("cublasGemmEx failed with status " + std::to_string(status));
}

}  // namespace qwen
