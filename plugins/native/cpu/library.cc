// The custom ops of domain qwen.native for ONNX Runtime's CPU execution provider.

#include "ops.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return qwen::register_ops(options, base, [](qwen::Domain& domain) {
    qwen::add_attention(domain);
    qwen::add_linear(domain);
    qwen::add_delta_net(domain);
    qwen::add_moe(domain);
    qwen::add_quantized(domain);
    qwen::add_top_logits(domain);
  });
}
