#pragma once

#include "operator.h"

namespace qwen {

// The ops of quant_ops.cc, of attention_op.cc, and of picture_ops.cc.
void add_quantized(Domain& domain);
void add_attention(Domain& domain);
void add_pictures(Domain& domain);

}  // namespace qwen
