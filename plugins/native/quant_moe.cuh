// The routed experts of a layer, int4 or int8 in panels (quant.cuh), expert after expert.
#pragma once

#include <cuda_runtime.h>

#include "quant.cuh"

namespace qwen {

constexpr int kMostExperts = 1024, kMostSelected = 32;

// Matrices are those of one expert: gate_up [2I,H] (gate rows, then up rows; I a multiple of 16) and down [H,I]; those of expert e begin
// `bytes()` times e further.
struct QuantMoe {
  QuantMatrix gate_up, down;
  int tokens, H, I, E, K;
};

// Bytes of workspace for `tokens` tokens.
size_t quant_moe_workspace(const QuantMoe& moe, size_t element);

// x [tokens,H], logits [tokens,E] -> y [tokens,H]: the K experts of the largest logits (of equal ones those of the lowest number), weighed by
// the softmax over these, in fp32. Up to 8 tokens read each expert's gate and up rows once. More are grouped by expert, 8 at a time.
template <typename T>
void quant_moe(const QuantMoe& moe, const T* x, const T* logits, T* y, void* workspace, cudaStream_t stream);

}  // namespace qwen
