// The kernels of Linear and SwiGlu, over matrices of the element type.
#pragma once

#include "chain.h"
#include "dense_product.h"
#include "operator.h"
#include "rows.cuh"
#include "skinny.cuh"

namespace qwen {

// x [...,K], w [N,K], residual [...,N]?, norm [K]?  ->  y [...,N]
template <typename T>
class LinearKernel {
 public:
  explicit LinearKernel(const Attributes& info) : eps_(info.real("epsilon")) {}

  std::vector<Shape> results(const Tensors& call) const {
    auto shape = call.shape(0);
    const auto weight = call.shape(1);
    expect(!shape.empty() && weight.size() == 2 && shape.back() == weight[1], "Linear: x [...,K] and w [N,K] do not fit");
    expect(weight[0] % 8 == 0 && weight[1] % 8 == 0, "Linear: N and K must be multiples of 8");
    shape.back() = weight[0];
    return {shape};
  }

  // What a call computes, with the memory of its result.
  ChainPart<T> part(Call& call) const {
    const auto weight = call.shape(1);
    ChainPart<T> p{};
    p.kind = ChainKind::kLinear, p.format = ChainFormat::kPlain, p.plain = call.input<T>(1);
    p.N = static_cast<int>(weight[0]), p.K = static_cast<int>(weight[1]);
    p.x = call.input<T>(0), p.residual = call.optional<T>(2), p.norm = call.optional<T>(3), p.eps = eps_, p.y = call.output<T>(0, results(call)[0]);
    return p;
  }

  void compute(Call& call) {
    const ChainPart<T> p = part(call);
    const int M = rows_of(call.shape(0)), N = p.N, K = p.K;
    T* y = p.y;
    const T *x = p.x, *w = p.plain, *residual = p.residual, *norm = p.norm;
    if (M == 0) return;
    if (M <= kSkinnyRows) {
      skinny_linear(x, w, residual, norm, eps_, y, M, N, K, call.stream());
      return;
    }
    if (norm == nullptr) {
      dense_product(call, x, w, residual, y, M, N, K, N);
      return;
    }
    const Scratch normed(call, sizeof(T) * M * size_t(K));
    rms_norm(x, norm, eps_, normed.as<T>(), M, K, call.stream());
    dense_product<T>(call, normed.as<T>(), w, residual, y, M, N, K, N);
  }

 private:
  float eps_;
};

// x [...,K], w [2N,K] (gate rows first), norm [K]?  ->  y [...,N]
template <typename T>
class SwiGluKernel {
 public:
  explicit SwiGluKernel(const Attributes& info) : eps_(info.real("epsilon")) {}

  std::vector<Shape> results(const Tensors& call) const {
    auto shape = call.shape(0);
    const auto weight = call.shape(1);
    expect(!shape.empty() && weight.size() == 2 && shape.back() == weight[1], "SwiGlu: x [...,K] and w [2N,K] do not fit");
    expect(weight[0] % 16 == 0 && weight[1] % 8 == 0, "SwiGlu: N and K must be multiples of 8");
    shape.back() = weight[0] / 2;
    return {shape};
  }

  ChainPart<T> part(Call& call) const {
    const auto weight = call.shape(1);
    ChainPart<T> p{};
    p.kind = ChainKind::kSwiGlu, p.format = ChainFormat::kPlain, p.plain = call.input<T>(1);
    p.N = static_cast<int>(weight[0] / 2), p.K = static_cast<int>(weight[1]);
    p.x = call.input<T>(0), p.norm = call.optional<T>(2), p.eps = eps_, p.y = call.output<T>(0, results(call)[0]);
    return p;
  }

  void compute(Call& call) {
    const ChainPart<T> p = part(call);
    const int M = rows_of(call.shape(0)), N = p.N, K = p.K;
    T* y = p.y;
    const T *x = p.x, *w = p.plain, *norm = p.norm;
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
    dense_product<T>(call, x, w, nullptr, h, M, 2 * N, K, 2 * N);
    gate(h, y, M, N, call.stream());
  }

 private:
  float eps_;
};

}  // namespace qwen
