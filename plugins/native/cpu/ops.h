// The ops of this library. Each function adds one file's ops to the domain; library.cc calls all of them.
#pragma once

#include "call.h"

namespace qwen {

void add_attention(Domain& domain);  // attention_op.cc
void add_linear(Domain& domain);     // linear_op.cc
void add_delta_net(Domain& domain);  // delta_net_op.cc
void add_moe(Domain& domain);        // moe_op.cc
void add_quantized(Domain& domain);  // quant_linear_op.cc
void add_top_logits(Domain& domain);  // top_logits_op.cc

}  // namespace qwen
