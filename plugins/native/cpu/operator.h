// Declares a kernel class to ONNX Runtime as a custom op of the CPU execution provider.
#pragma once

#include "call.h"

namespace qwen {

template <typename Kernel>
struct Operator : CustomOp<Kernel, Call> {
  explicit Operator(Signature signature) : CustomOp<Kernel, Call>("CPUExecutionProvider", OrtElement::kFloat, signature) {}
};

}  // namespace qwen
