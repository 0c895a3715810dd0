#pragma once

#include "operator.h"

namespace qwen {

// The ops of quant_ops.cc, of fp8_ops.cc, of attention_op.cc, of mixture_ops.cc, of picture_ops.cc, and of chain_op.cc.
void add_quantized(Domain& domain);
void add_fp8(Domain& domain);
void add_attention(Domain& domain);
void add_mixtures(Domain& domain);
void add_pictures(Domain& domain);
void add_chains(Domain& domain);

}  // namespace qwen
