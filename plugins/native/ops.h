#pragma once

#include "operator.h"

namespace qwen {

// The ops of quant_ops.cc, of fp8_ops.cc, and of attention_op.cc.
void add_quantized(Domain& domain);
void add_fp8(Domain& domain);
void add_attention(Domain& domain);

}  // namespace qwen
