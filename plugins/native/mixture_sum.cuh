// What a mixture layer adds up behind its experts.
#pragma once

#include <cuda_runtime.h>

namespace qwen {

// y[m] = experts[m] + sigmoid(x[m] . gate) * shared[m] + residual[m], in fp32, rounded once.
//   experts, shared, x, y [M,H]  gate [H]  residual [M,H] or null; H a multiple of 8
// A row has the same bits whatever M is.
template <typename T>
void shared_expert_sum(const T* experts, const T* shared, const T* x, const T* gate, const T* residual, T* y, int M, int H, cudaStream_t stream);

}  // namespace qwen
