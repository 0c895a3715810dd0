// The ops around the experts of a mixture layer. ONNX Runtime's kernels would do; they do not overlap with those before and behind them.
//
// RmsNorm (attribute epsilon)   x T[...,K], weight T[K]  ->  y T[...,K]: the norm that router, experts and shared expert read
// SharedExpertSum               experts, shared, x T[...,H], gate T[1,H], residual T[...,H]?
//                                 ->  y T[...,H] = experts + sigmoid(x . gate) * shared + residual, rounded once
// QuantMixture                  s T[...,H], norm T[H], router T[E,H], gate T[1,H], packed shared_gate_up, packed shared_down, packed gate_up and down of
//                               the experts  ->  y T[...,H]: RmsNorm, Linear, QuantSwiGlu, QuantLinear, QuantMoe and SharedExpertSum of a layer, whose
//                               attributes it has, behind norm_, router_, shared_gate_up_, shared_down_ and experts_

#include "mixture.cuh"
#include "mixture_sum.cuh"
#include "ops.h"
#include "plain_ops.h"
#include "quant_form.h"
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

// Few tokens have kernels of their own (mixture.cuh); more are the ops that this one stands for, one after the other.
template <typename T>
class QuantMixtureKernel {
 public:
  explicit QuantMixtureKernel(const Attributes& info)
      : norm_(info.of_part("norm_")),
        router_(info.of_part("router_")),
        shared_gate_up_(info.of_part("shared_gate_up_")),
        shared_down_(info.of_part("shared_down_")),
        experts_(info.of_part("experts_")),
        sum_(info),
        eps_(info.real("norm_epsilon")),
        gate_up_matrix_(matrix_of<PackedForm>(info.of_part("shared_gate_up_"))),
        down_matrix_(matrix_of<PackedForm>(info.of_part("shared_down_"))) {
    expect(gate_up_matrix_.N == 2 * down_matrix_.K && gate_up_matrix_.K == down_matrix_.N && down_matrix_.K % kPanelRows == 0,
           "QuantMixture: the matrices of the shared expert do not fit");
  }

  void compute(Call& call) {
    const Shape shape = call.shape(kStream), router = call.shape(kRouter);
    const int64_t H = down_matrix_.N;
    expect(!shape.empty() && shape.back() == H && call.shape(kNorm) == Shape{H} && call.shape(kGate) == Shape({1, H}), "QuantMixture: s, norm and gate are not of one width");
    expect(router.size() == 2 && router[1] == H, "QuantMixture: the router is not [E,H]");
    T* y = call.output<T>(0, shape);
    const int M = int(rows_of(shape));
    if (M == 0) return;
    Mixture<T> mixture{};
    mixture.s = call.input<T>(kStream), mixture.norm = call.input<T>(kNorm), mixture.router = call.input<T>(kRouter), mixture.gate = call.input<T>(kGate);
    mixture.y = y, mixture.eps = eps_, mixture.S = down_matrix_.K;
    mixture.shared_gate_up = gate_up_matrix_, mixture.shared_down = down_matrix_;
    PackedForm::give(call, kSharedGateUp, mixture.shared_gate_up);
    PackedForm::give(call, kSharedDown, mixture.shared_down);
    mixture.routed = experts_.given(call, kExperts, int(router[0]), int(H));
    mixture.routed.tokens = M;
    if (has_mixture(mixture)) {
      const Scratch workspace(call, mixture_workspace(mixture));
      run_mixture(mixture, workspace.as<void>(), call.stream());
    } else {
      one_by_one(call, shape, router[0], y);
    }
  }

 private:
  static constexpr size_t kStream = 0, kNorm = 1, kRouter = 2, kGate = 3, kSharedGateUp = 4, kSharedDown = 5, kExperts = 6;

  // A tensor in memory for the time of a call.
  struct Made {
    Shape shape;
    Scratch memory;

    Made(const Call& call, Shape shape, int64_t width) : shape(std::move(shape)), memory(call, sizeof(T) * size_t(rows_of(this->shape)) * width) { this->shape.back() = width; }
    TensorAt at() const { return {true, shape, memory.as<void>()}; }
  };

  void one_by_one(Call& call, const Shape& shape, int64_t E, T* y) {
    const auto given = [&](size_t input) { return TensorAt{true, call.shape(input), const_cast<void*>(static_cast<const void*>(call.input<uint8_t>(input)))}; };
    const auto run = [&](auto& op, std::vector<TensorAt> inputs, const TensorAt& result) {
      const std::vector<TensorAt> results{result};
      Call part(call, inputs, results);
      op.compute(part);
    };
    const int64_t H = shape.back();
    const Made h(call, shape, H), logits(call, shape, E), inner(call, shape, down_matrix_.K), shared(call, shape, H), routed(call, shape, H);
    run(norm_, {given(kStream), given(kNorm)}, h.at());
    run(router_, {h.at(), given(kRouter)}, logits.at());
    run(shared_gate_up_, {h.at(), given(kSharedGateUp)}, inner.at());
    run(shared_down_, {inner.at(), given(kSharedDown)}, shared.at());
    run(experts_, {h.at(), logits.at(), given(kExperts), given(kExperts + 1)}, routed.at());
    run(sum_, {routed.at(), shared.at(), h.at(), given(kGate), given(kStream)}, {true, shape, y});
  }

  RmsNormKernel<T> norm_;
  LinearKernel<T> router_;
  MatrixSwiGluKernel<PackedForm, T> shared_gate_up_;
  MatrixLinearKernel<PackedForm, T> shared_down_;
  MatrixMoeKernel<PackedForm, T> experts_;
  SharedExpertSumKernel<T> sum_;
  float eps_;
  QuantMatrix gate_up_matrix_, down_matrix_;
};

template <typename T>
void add(Domain& domain) {
  static const Operator<T, RmsNormKernel<T>> norm({"RmsNorm", "TT", "T"});
  static const Operator<T, SharedExpertSumKernel<T>> sum({"SharedExpertSum", "TTTTT?", "T"});
  static const Operator<T, QuantMixtureKernel<T>> mixture({"QuantMixture", "TTTTbbbb", "T"});
  domain.add(norm);
  domain.add(sum);
  domain.add(mixture);
}

}  // namespace

void add_mixtures(Domain& domain) {
  add<__half>(domain);
  add<__nv_bfloat16>(domain);
}

}  // namespace qwen
