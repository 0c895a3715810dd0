// A whole mixture layer of a few tokens, quantized (quant.cuh).
#pragma once

#include <cuda_runtime.h>

#include "moe.cuh"

namespace qwen {

// y = s + routed(h) + sigmoid(h . gate) * shared(h),  h = norm(s)
//   s, y [tokens,H]  norm [H]  router [E,H]: h router^T, rounded to T, are the logits that choose (moe.cuh)  gate [H]
//   shared_gate_up [2S,H], shared_down [H,S]: the shared expert, S a multiple of 16
// The sum is made in fp32 and rounded once.
template <typename T>
struct Mixture {
  Experts<QuantMatrix> routed;
  QuantMatrix shared_gate_up, shared_down;
  int S;
  const T *s, *norm, *router, *gate;
  float eps;
  T* y;
};

// Whether `run_mixture` has kernels for this: up to 8 tokens, matrices of one number of bits, and shared memory enough. For up to 8 tokens a row
// has the same bits in any company.
template <typename T>
bool has_mixture(const Mixture<T>& mixture);
template <typename T>
size_t mixture_workspace(const Mixture<T>& mixture);
template <typename T>
void run_mixture(const Mixture<T>& mixture, void* workspace, cudaStream_t stream);

}  // namespace qwen
