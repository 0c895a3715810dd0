// The routed experts of a layer, quantized (quant.cuh, fp8.cuh), expert after expert.
#pragma once

#include <cuda_runtime.h>

#include "fp8.cuh"
#include "quant.cuh"

namespace qwen {

constexpr int kMostExperts = 1024, kMostSelected = 32;

// Matrices are those of one expert: gate_up [2I,H] (gate rows, then up rows; I a multiple of 16) and down [H,I]; those of expert e are
// `gate_up.expert(e)` and `down.expert(e)`.
template <typename Matrix>
struct Experts {
  Matrix gate_up, down;
  int tokens, H, I, E, K;
};

// Bytes of workspace for `tokens` tokens.
template <typename T>
size_t moe_workspace(const Experts<QuantMatrix>& moe);
template <typename T>
size_t moe_workspace(const Experts<Fp8Matrix>& moe);

// x [tokens,H], logits [tokens,E] -> y [tokens,H]: the K experts of the largest logits (of equal ones those of the lowest number), weighed by
// the softmax over these, in fp32. Up to 8 tokens read each expert's gate and up rows once. More are grouped by expert, 8 at a time.
template <typename T>
void run_moe(const Experts<QuantMatrix>& moe, const T* x, const T* logits, T* y, void* workspace, cudaStream_t stream);
template <typename T>
void run_moe(const Experts<Fp8Matrix>& moe, const T* x, const T* logits, T* y, void* workspace, cudaStream_t stream);

}  // namespace qwen
