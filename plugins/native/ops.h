#pragma once

#include "operator.h"

namespace qwen {

// The ops of quant_ops.cc.
void add_quantized(Domain& domain);

}  // namespace qwen
