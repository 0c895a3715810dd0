// Products of 16-bit matrices for many rows, in an op.
#pragma once

#include <cstdint>
#include <optional>

#include "cublas_lt.h"
#include "operator.h"

namespace qwen {

// y [M,N] = x [M,K] w [N,K]^T + beta * y, row-major with `stride` elements from row to row of y, fp32 accumulation.
template <typename T>
void dense_product(const Call& call, const T* x, const T* w, float beta, T* y, int M, int N, int K, int stride) {
  const LtShape shape{Type<T>::element, false, M, N, K, stride};
  const auto at = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const LtPlan plan = (at(x) | at(w) | at(y)) % 16 == 0 ? lt_plan(call.cublas(), shape) : LtPlan{};
  if (!plan.found) {
    product(call.cublas(), Type<T>::element, x, w, beta, y, M, N, K, stride);
    return;
  }
  std::optional<Scratch> workspace;
  if (plan.workspace > 0) workspace.emplace(call, plan.workspace);
  lt_product(call.cublas(), plan, shape, x, nullptr, w, nullptr, beta, y, workspace ? workspace->template as<void>() : nullptr, call.stream());
}

}  // namespace qwen
