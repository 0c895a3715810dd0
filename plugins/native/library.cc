// The custom ops of domain qwen.native for ONNX Runtime's CUDA execution provider. Each op exists for fp16 and bf16, DeltaNet for fp32 too.

#include <algorithm>

#include "delta_net.cuh"
#include "operator.h"
#include "ops.h"
#include "rows.cuh"
#include "skinny.cuh"
#include "top_logits.cuh"

namespace qwen {
namespace {

// x [...,K], w [N,K], residual [...,N]?, norm [K]?  ->  y [...,N]
template <typename T>
class LinearKernel {
 public:
  explicit LinearKernel(const Attributes& info) : eps_(info.real("epsilon")) {}

  void compute(Call& call) {
    auto shape = call.shape(0);
    const auto weight = call.shape(1);
    expect(!shape.empty() && weight.size() == 2 && shape.back() == weight[1], "Linear: x [...,K] and w [N,K] do not fit");
    expect(weight[0] % 8 == 0 && weight[1] % 8 == 0, "Linear: N and K must be multiples of 8");
    const int M = rows_of(shape), N = static_cast<int>(weight[0]), K = static_cast<int>(weight[1]);
    const T *x = call.input<T>(0), *w = call.input<T>(1), *residual = call.optional<T>(2), *norm = call.optional<T>(3);
    shape.back() = N;
    T* y = call.output<T>(0, shape);
    if (M == 0) return;
    if (M <= kSkinnyRows) {
      skinny_linear(x, w, residual, norm, eps_, y, M, N, K, call.stream());
      return;
    }
    if (residual != nullptr && residual != y)
      check(cudaMemcpyAsync(y, residual, sizeof(T) * M * size_t(N), cudaMemcpyDeviceToDevice, call.stream()), "cudaMemcpyAsync");
    const float beta = residual != nullptr ? 1.0f : 0.0f;
    if (norm == nullptr) {
      product(call.cublas(), Type<T>::element, x, w, beta, y, M, N, K, N);
      return;
    }
    const Scratch normed(call, sizeof(T) * M * size_t(K));
    rms_norm(x, norm, eps_, normed.as<T>(), M, K, call.stream());
    product(call.cublas(), Type<T>::element, normed.as<T>(), w, beta, y, M, N, K, N);
  }

 private:
  float eps_;
};

// x [...,K], w [2N,K] (gate rows first), norm [K]?  ->  y [...,N]
template <typename T>
class SwiGluKernel {
 public:
  explicit SwiGluKernel(const Attributes& info) : eps_(info.real("epsilon")) {}

  void compute(Call& call) {
    auto shape = call.shape(0);
    const auto weight = call.shape(1);
    expect(!shape.empty() && weight.size() == 2 && shape.back() == weight[1], "SwiGlu: x [...,K] and w [2N,K] do not fit");
    expect(weight[0] % 16 == 0 && weight[1] % 8 == 0, "SwiGlu: N and K must be multiples of 8");
    const int M = rows_of(shape), N = static_cast<int>(weight[0] / 2), K = static_cast<int>(weight[1]);
    const T *x = call.input<T>(0), *w = call.input<T>(1), *norm = call.optional<T>(2);
    shape.back() = N;
    T* y = call.output<T>(0, shape);
    if (M == 0) return;
    if (M <= kSkinnyRows) {
      skinny_swiglu(x, w, norm, eps_, y, M, N, K, call.stream());
      return;
    }
    const size_t hidden = size_t(M) * 2 * N;
    const Scratch scratch(call, sizeof(T) * (hidden + (norm != nullptr ? size_t(M) * K : 0)));
    T* h = scratch.as<T>();
    if (norm != nullptr) {
      rms_norm(x, norm, eps_, h + hidden, M, K, call.stream());
      x = h + hidden;
    }
    product(call.cublas(), Type<T>::element, x, w, 0.0f, h, M, 2 * N, K, 2 * N);
    gate(h, y, M, N, call.stream());
  }

 private:
  float eps_;
};

// packed [B,T,C+Hv*D+2Hv] (qkv | z | a | b), conv [C,4], a_log f32[Hv], dt_bias f32[Hv], norm [D], history [B,3,C],
// state f32[B,Hv,D,D] (V-major), and for a transaction pending [B,P,width], accepted i64[B], commit i64[B]
//   ->  y [B,T,Hv*D], history', state'
template <typename T>
class DeltaNetKernel {
 public:
  explicit DeltaNetKernel(const Attributes& info) {
    eps_ = info.real("epsilon");
    key_heads_ = static_cast<int>(info.integer("key_heads"));
    check(cudaMalloc(&arrivals_, sizeof(int) * kArrivals), "cudaMalloc");
    check(cudaMemset(arrivals_, 0, sizeof(int) * kArrivals), "cudaMemset");
  }
  ~DeltaNetKernel() { cudaFree(arrivals_); }

  void compute(Call& call) {
    const auto packed = call.shape(0), state = call.shape(6), history = call.shape(5);
    expect(packed.size() == 3 && state.size() == 4 && state[2] == state[3] && takes_head(state[3]), "DeltaNet: heads must have 64 or 128 values");
    DeltaNetShape shape{int(packed[0]), int(packed[1]), key_heads_, int(state[1]), 0, int(state[3])};
    expect(shape.Hv % shape.Hk == 0 && shape.width() == packed[2] && history[2] == shape.channels(), "DeltaNet: the packed projection does not fit the heads");
    expect(call.shape(1).back() == kTaps, "DeltaNet: the convolution must have 4 taps");
    const bool transaction = call.has(7);
    expect(transaction == call.has(8) && transaction == call.has(9), "DeltaNet: pending, accepted and commit are given together or not at all");
    if (transaction) {
      const auto pending = call.shape(7), sequences = std::vector<int64_t>{packed[0]};
      expect(pending.size() == 3 && pending[0] == packed[0] && pending[2] == packed[2], "DeltaNet: pending is not shaped like the packed projection");
      expect(call.shape(8) == sequences && call.shape(9) == sequences, "DeltaNet: accepted and commit have one number per sequence");
      shape.P = int(pending[1]);
    }
    DeltaNetTensors<T> tensors{call.input<T>(0),
                                     call.input<T>(1),
                                     call.input<float>(2),
                                     call.input<float>(3),
                                     call.input<T>(4),
                                     call.input<T>(5),
                                     call.input<float>(6),
                                     call.optional<T>(7),
                                     call.optional<int64_t>(8),
                                     call.optional<int64_t>(9),
                                     call.output<T>(0, {packed[0], packed[1], state[1] * state[3]}),
                                     call.output<T>(1, history),
                                     call.output<float>(2, state)};
    if (shape.B == 0) return;
    const size_t bytes = delta_net_workspace(shape);
    if (bytes == 0) {
      delta_net(shape, tensors, eps_, nullptr, arrivals_, kArrivals, call.stream());
      return;
    }
    const Scratch workspace(call, bytes);
    delta_net(shape, tensors, eps_, workspace.as<void>(), arrivals_, kArrivals, call.stream());
  }

 private:
  static constexpr int kArrivals = 256 * 64;  // sequences times key heads
  float eps_ = 0.0f;
  int key_heads_ = 0;
  int* arrivals_ = nullptr;
};

// logits f32 [...,V]  ->  values f32 [...,K], ids i32 [...,K]; K = min(attribute k, V)
class TopLogitsKernel {
 public:
  explicit TopLogitsKernel(const Attributes& info) : k_(info.integer("k")) {
    expect(0 < k_ && k_ <= 64, "TopLogits: k is at most 64");
  }

  void compute(Call& call) {
    auto shape = call.shape(0);
    expect(!shape.empty() && 0 < shape.back() && shape.back() < 1 << 30, "TopLogits: logits must be [...,V]");
    const int rows = rows_of(shape), V = static_cast<int>(shape.back()), K = std::min(static_cast<int>(k_), V);
    shape.back() = K;
    float* values = call.output<float>(0, shape);
    int32_t* ids = call.output<int32_t>(1, shape);
    if (rows == 0) return;
    const Scratch scratch(call, top_logits_scratch(rows, V));
    top_logits(call.input<float>(0), values, ids, rows, V, K, scratch.as<void>(), call.stream());
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
  static const Operator<float, TopLogitsKernel> op({"TopLogits", "f", "fi"});
  domain.add(op);
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
    add_pictures(domain);
  });
}
