// The ops of this library. Each function adds one file's ops to the domain; library.cc calls all of them.
#pragma once

#include "call.h"

namespace qwen {

void add_linear(Ort::CustomOpDomain& domain);     // linear_op.cc
void add_delta_net(Ort::CustomOpDomain& domain);  // delta_net_op.cc
void add_moe(Ort::CustomOpDomain& domain);        // moe_op.cc
void add_quantized(Ort::CustomOpDomain& domain);  // quant_linear_op.cc
void add_top_logits(Ort::CustomOpDomain& domain);  // top_logits_op.cc

}  // namespace qwen
