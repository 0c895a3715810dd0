// y = x w^T over a weight [N,K] in the checkpoint's order, read in place: the kernels of Linear and SwiGlu.
//
// A result is the sum over k in one order, whatever M is and however the work is split: lane k mod L of one vector accumulator, then the
// lanes. A row gives the same bits alone and among others, so that a token checked in a batch of drafts is the token that decoding makes.
#pragma once

#include <cstddef>

#include "isa.h"

namespace qwen {

struct Product {
  const float* x;  // made by pack_rows
  const void* w;   // [N,K], SwiGlu: [2N,K], gate rows first
  bool bf16;       // element of w: bf16, else fp32
  bool gated;      // y = silu(gate) * up
  const float* residual;  // [M,N] or null
  float* y;               // [M,N]
  size_t M, N, K;
};

#define QWEN_PRODUCT(SET)                                                                                                  \
  namespace SET {                                                                                                          \
  /* How many floats pack_rows writes for M rows. */                                                                       \
  size_t packed_size(size_t M, size_t K);                                                                                  \
  /* How many groups pack_rows makes of M rows. */                                                                         \
  size_t packed_groups(size_t M);                                                                                          \
  /* Groups first..last-1 of x [M,K], normalized where norm [K] is given: x / sqrt(mean(x^2) + eps) * norm. */             \
  void pack_rows(const float* x, const float* norm, float eps, size_t M, size_t K, size_t first, size_t last, float* out); \
  /* Columns first..last-1 of y. `first` is a multiple of 4. */                                                            \
  void product(const Product& p, size_t first, size_t last);                                                               \
  }
QWEN_SETS(QWEN_PRODUCT)

}  // namespace qwen
