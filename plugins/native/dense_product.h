// Products of 16-bit matrices for many rows, in an op.
#pragma once

#include <cstdint>
#include <optional>

#include "cublas_lt.h"
#include "operator.h"

namespace qwen {

// y [M,N] = x [M,K] w [N,K]^T + residual [M,N], row-major with `stride` elements from row to row of y and residual, fp32 accumulation.
// `residual` may be y, or null.
template <typename T>
void dense_product(const Call& call, const T* x, const T* w, const T* residual, T* y, int M, int N, int K, int stride) {
  const LtShape shape{Type<T>::element, false, M, N, K, stride};
  const auto at = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const LtPlan plan = (at(x) | at(w) | at(y) | at(residual)) % 16 == 0 ? lt_plan(call.cublas(), shape) : LtPlan{};
  if (!plan.found) {
    if (residual != nullptr && residual != y) {
      const size_t pitch = sizeof(T) * stride;
      check(cudaMemcpy2DAsync(y, pitch, residual, pitch, sizeof(T) * N, M, cudaMemcpyDeviceToDevice, call.stream()), "cudaMemcpy2DAsync");
    }
    product(call.cublas(), Type<T>::element, x, w, residual != nullptr, y, M, N, K, stride);
    return;
  }
  std::optional<Scratch> workspace;
  if (plan.workspace > 0) workspace.emplace(call, plan.workspace);
  lt_product(call.cublas(), plan, shape, x, nullptr, w, nullptr, residual, y, workspace ? workspace->template as<void>() : nullptr, call.stream());
}

}  // namespace qwen
