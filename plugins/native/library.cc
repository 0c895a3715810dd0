// The custom ops of domain qwen.native for ONNX Runtime's CUDA execution provider. Each op exists for fp16 and bf16, DeltaNet for fp32 too.

#include <algorithm>

#include "delta_net_op.h"
#include "operator.h"
#include "ops.h"
#include "plain_ops.h"
#include "top_logits.cuh"

namespace qwen {
namespace {

// logits T [...,V]  ->  values f32 [...,K], ids i32 [...,K]; K = min(attribute k, V). With T of 16 bits also the logits f32 [...,V]
template <typename T>
class TopLogitsKernel {
 public:
  explicit TopLogitsKernel(const Attributes& info) : k_(info.integer("k")) {
    expect(0 < k_ && k_ <= 64, "TopLogits: k is at most 64");
  }

  void compute(Call& call) {
    auto shape = call.shape(0);
    expect(!shape.empty() && 0 < shape.back() && shape.back() < 1 << 30, "TopLogits: logits must be [...,V]");
    const int rows = rows_of(shape), V = static_cast<int>(shape.back()), K = std::min(static_cast<int>(k_), V);
    float* wide = nullptr;
    if constexpr (sizeof(T) == 2) wide = call.output<float>(2, shape);
    shape.back() = K;
    float* values = call.output<float>(0, shape);
    int32_t* ids = call.output<int32_t>(1, shape);
    if (rows == 0) return;
    const Scratch scratch(call, top_logits_scratch(rows, V));
    top_logits(call.input<T>(0), wide, values, ids, rows, V, K, scratch.as<void>(), call.stream());
  }

 private:
  int64_t k_;
};

template <typename T>
void add_delta_net(Domain& domain) {
  static const Operator<T, DeltaNetKernel<T>> delta_net({"DeltaNet", "TTffTTfT?l?l?", "TTf"});
  domain.add(delta_net);
}

template <typename T>
void add_products(Domain& domain) {
  static const Operator<T, LinearKernel<T>> linear({"Linear", "TTT?T?", "T"});
  static const Operator<T, SwiGluKernel<T>> swiglu({"SwiGlu", "TTT?", "T"});
  domain.add(linear);
  domain.add(swiglu);
}

void add_top_logits(Domain& domain) {
  static const Operator<float, TopLogitsKernel<float>> narrow({"TopLogits", "f", "fi"});
  static const Operator<__half, TopLogitsKernel<__half>> half({"WideTopLogits", "T", "fif"});
  static const Operator<__nv_bfloat16, TopLogitsKernel<__nv_bfloat16>> bfloat16({"WideTopLogits", "T", "fif"});
  domain.add(narrow);
  domain.add(half);
  domain.add(bfloat16);
}

}  // namespace
}  // namespace qwen

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return qwen::register_ops(options, base, [](qwen::Domain& domain) {
    using namespace qwen;
    add_products<__half>(domain);
    add_products<__nv_bfloat16>(domain);
    add_delta_net<float>(domain);
    add_delta_net<__half>(domain);
    add_delta_net<__nv_bfloat16>(domain);
    add_top_logits(domain);
    add_quantized(domain);
    add_fp8(domain);
    add_attention(domain);
    add_mixtures(domain);
    add_chains(domain);
    add_pictures(domain);
  });
}
