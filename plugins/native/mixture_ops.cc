// The ops around the experts of a mixture layer. ONNX Runtime's kernels would do; they do not overlap with those before and behind them.
//
// RmsNorm (attribute epsilon)   x T[...,K], weight T[K]  ->  y T[...,K]: the norm that router, experts and shared expert read
// SharedExpertSum               experts, shared, x T[...,H], gate T[1,H], residual T[...,H]?
//                                 ->  y T[...,H] = experts + sigmoid(x . gate) * shared + residual, rounded once

#include "mixture_sum.cuh"
#include "ops.h"
#include "rows.cuh"

namespace qwen {
namespace {

template <typename T>
class RmsNormKernel {
 public:
  explicit RmsNormKernel(const Attributes& info) : eps_(info.real("epsilon")) {}

  void compute(Call& call) {
    const auto shape = call.shape(0);
    expect(!shape.empty() && shape.back() % 8 == 0 && call.shape(1) == Shape{shape.back()}, "RmsNorm: x [...,K] and weight [K] do not fit, or K is no multiple of 8");
    T* y = call.output<T>(0, shape);
    const int M = int(rows_of(shape));
    if (M > 0) rms_norm(call.input<T>(0), call.input<T>(1), eps_, y, M, int(shape.back()), call.stream());
  }

 private:
  float eps_;
};

template <typename T>
class SharedExpertSumKernel {
 public:
  explicit SharedExpertSumKernel(const Attributes&) {}

  void compute(Call& call) {
    const auto shape = call.shape(0);
    expect(!shape.empty() && call.shape(1) == shape && call.shape(2) == shape, "SharedExpertSum: experts, shared and x are not of one shape");
    const int64_t H = shape.back();
    expect(H % 8 == 0 && call.shape(3) == Shape{1, H}, "SharedExpertSum: the gate is not [1,H], or H is no multiple of 8");
    expect(!call.has(4) || call.shape(4) == shape, "SharedExpertSum: the residual has another shape");
    T* y = call.output<T>(0, shape);
    const int M = int(rows_of(shape));
    if (M == 0) return;
    shared_expert_sum(call.input<T>(0), call.input<T>(1), call.input<T>(2), call.input<T>(3), call.optional<T>(4), y, M, int(H), call.stream());
  }
};

template <typename T>
void add(Domain& domain) {
  static const Operator<T, RmsNormKernel<T>> norm({"RmsNorm", "TT", "T"});
  static const Operator<T, SharedExpertSumKernel<T>> sum({"SharedExpertSum", "TTTTT?", "T"});
  domain.add(norm);
  domain.add(sum);
}

}  // namespace

void add_mixtures(Domain& domain) {
  add<__half>(domain);
  add<__nv_bfloat16>(domain);
}

}  // namespace qwen
