// The ops on quantized matrices, over a form in which matrices are given (quant_ops.cc, fp8_ops.cc). A form has
//
//   Matrix, kInputs          what the kernels take, and how many inputs of an op it is
//   of(attributes, prefix)   a matrix without sizes and data, from the attributes of a node
//   give(call, input, w)     its data, which begin at an input; throws where they do not have the size that w says
//   give_experts(call, input, w, E)     the same for the matrices of E experts
//   put(w, part)             it as the matrix of a part of a chain
//   linear, swiglu, gather   the kernels of few rows; what they get last is memory for norm(x), or null
//   has_many<T>(w, M)        whether kernels for M rows, more than few, are there and better than `large`; then
//   many_workspace(w, M), linear_many, swiglu_many     their workspace, and the kernels (quant.cuh)
//   large<T>(call, w, x, residual, y, M, stride)     y [M, stride] = x [M,K] w^T + residual in its first N columns, for any number of rows
#pragma once

#include <algorithm>
#include <optional>

#include "chain.h"
#include "dense_product.h"
#include "moe.cuh"
#include "operator.h"
#include "rows.cuh"

namespace qwen {

constexpr int kTokensTogether = 2048;

template <typename Form>
typename Form::Matrix matrix_of(const Attributes& info) {
  typename Form::Matrix w = Form::of(info, "");
  w.N = static_cast<int>(info.integer("N"));
  w.K = static_cast<int>(info.integer("K"));
  expect(w.N > 0 && w.K > 0 && w.K % 8 == 0, "the columns of a quantized matrix must be a multiple of 8");
  return w;
}

// Memory for the normalized input of a product of several rows, for the time of a call.
template <typename T>
class NormedRows {
 public:
  NormedRows(const Call& call, const T* norm, int M, int K) {
    if (norm != nullptr && M > 1) rows_.emplace(call, sizeof(T) * size_t(M) * K);
  }
  T* memory() const { return rows_ ? rows_->template as<T>() : nullptr; }

 private:
  std::optional<Scratch> rows_;
};

template <typename Form, typename T>
class MatrixLinearKernel {
 public:
  explicit MatrixLinearKernel(const Attributes& info) : w_(matrix_of<Form>(info)), eps_(info.real("epsilon")) {}

  std::vector<Shape> results(const Tensors& call) const {
    auto shape = call.shape(0);
    expect(!shape.empty() && shape.back() == w_.K, "a quantized product: x [...,K] and the matrix do not fit");
    shape.back() = w_.N;
    if (call.has(kTail)) {
      const auto tail = call.shape(kTail);
      expect(tail.size() == 2 && tail[1] == w_.K, "a quantized product: the tail must be [R,K]");
      shape.back() += tail[0];
    }
    return {shape};
  }

  // What a call computes, with the memory of its result.
  ChainPart<T> part(Call& call) const {
    ChainPart<T> p{};
    p.kind = ChainKind::kLinear, p.N = w_.N, p.K = w_.K, p.eps = eps_, p.y = call.output<T>(0, results(call)[0]);
    p.x = call.input<T>(0), p.residual = call.optional<T>(kResidual), p.norm = call.optional<T>(kNorm), p.tail = call.optional<T>(kTail);
    if (p.tail != nullptr) p.tail_rows = static_cast<int>(call.shape(kTail)[0]);
    Form::put(matrix(call), p);
    return p;
  }

  void compute(Call& call) {
    const ChainPart<T> p = part(call);
    const typename Form::Matrix w = matrix(call);
    const int M = rows_of(call.shape(0)), K = p.K, tail_rows = p.tail_rows, width = w.N + tail_rows;
    T* y = p.y;
    const T *x = p.x, *residual = p.residual, *norm = p.norm, *tail = p.tail;
    if (M == 0) return;
    if (M <= kFewColumns) {
      const NormedRows<T> normed(call, norm, M, K);
      Form::linear(w, x, tail, tail_rows, residual, norm, eps_, y, M, call.stream(), normed.memory());
      return;
    }
    if (Form::template has_many<T>(w, M)) {
      const Scratch workspace(call, Form::many_workspace(w, M));
      Form::linear_many(w, x, tail, tail_rows, residual, norm, eps_, y, M, workspace.as<void>(), call.stream());
      return;
    }
    const Scratch normed(call, norm != nullptr ? sizeof(T) * M * size_t(K) : 256);
    if (norm != nullptr) {
      rms_norm(x, norm, eps_, normed.as<T>(), M, K, call.stream());
      x = normed.as<T>();
    }
    Form::large(call, w, x, residual, y, M, width);
    if (tail != nullptr) dense_product(call, x, tail, residual != nullptr ? residual + w.N : nullptr, y + w.N, M, tail_rows, K, width);
  }

 private:
  static constexpr size_t kResidual = 1 + Form::kInputs, kNorm = kResidual + 1, kTail = kNorm + 1;

  typename Form::Matrix matrix(const Tensors& call) const {
    typename Form::Matrix w = w_;
    Form::give(call, 1, w);
    return w;
  }

  typename Form::Matrix w_;
  float eps_;
};

template <typename Form, typename T>
class MatrixSwiGluKernel {
 public:
  explicit MatrixSwiGluKernel(const Attributes& info) : w_(matrix_of<Form>(info)), eps_(info.real("epsilon")) {
    expect(w_.N % (2 * kPanelRows) == 0, "a quantized SwiGlu: gate and up must each have a multiple of 16 rows");
  }

  std::vector<Shape> results(const Tensors& call) const {
    auto shape = call.shape(0);
    expect(!shape.empty() && shape.back() == w_.K, "a quantized SwiGlu: x [...,K] and the matrix do not fit");
    shape.back() = w_.N / 2;
    return {shape};
  }

  ChainPart<T> part(Call& call) const {
    ChainPart<T> p{};
    p.kind = ChainKind::kSwiGlu, p.N = w_.N / 2, p.K = w_.K, p.eps = eps_, p.y = call.output<T>(0, results(call)[0]);
    p.x = call.input<T>(0), p.norm = call.optional<T>(1 + Form::kInputs);
    Form::put(matrix(call), p);
    return p;
  }

  void compute(Call& call) {
    const ChainPart<T> p = part(call);
    const typename Form::Matrix w = matrix(call);
    const int M = rows_of(call.shape(0)), N = p.N, K = p.K;
    T* y = p.y;
    const T *x = p.x, *norm = p.norm;
    if (M == 0) return;
    if (M <= kFewColumns) {
      const NormedRows<T> normed(call, norm, M, K);
      Form::swiglu(w, x, norm, eps_, y, M, call.stream(), normed.memory());
      return;
    }
    if (Form::template has_many<T>(w, M)) {
      const Scratch workspace(call, Form::many_workspace(w, M));
      Form::swiglu_many(w, x, norm, eps_, y, M, workspace.as<void>(), call.stream());
      return;
    }
    const size_t hidden = size_t(M) * w.N;
    const Scratch scratch(call, sizeof(T) * (hidden + (norm != nullptr ? size_t(M) * K : 0)));
    T* h = scratch.as<T>();
    if (norm != nullptr) {
      rms_norm(x, norm, eps_, h + hidden, M, K, call.stream());
      x = h + hidden;
    }
    Form::template large<T>(call, w, x, nullptr, h, M, w.N);
    gate(h, y, M, N, call.stream());
  }

 private:
  typename Form::Matrix matrix(const Tensors& call) const {
    typename Form::Matrix w = w_;
    Form::give(call, 1, w);
    return w;
  }

  typename Form::Matrix w_;
  float eps_;
};

template <typename Form, typename T>
class MatrixGatherKernel {
 public:
  explicit MatrixGatherKernel(const Attributes& info) : w_(matrix_of<Form>(info)) {}

  void compute(Call& call) {
    auto shape = call.shape(0);
    typename Form::Matrix w = w_;
    Form::give(call, 1, w);
    shape.push_back(w.K);
    T* y = call.output<T>(0, shape);
    if (const int count = rows_of(shape); count > 0) Form::gather(w, call.input<int64_t>(0), y, count, call.stream());
  }

 private:
  typename Form::Matrix w_;
};

template <typename Form, typename T>
class MatrixMoeKernel {
 public:
  explicit MatrixMoeKernel(const Attributes& info) {
    moe_.K = static_cast<int>(info.integer("top_k"));
    moe_.I = static_cast<int>(info.integer("inner"));
    moe_.gate_up = Form::of(info, "gate_up_");
    moe_.down = Form::of(info, "down_");
    expect(moe_.I > 0 && moe_.I % kPanelRows == 0, "quantized experts: the width of an expert must be a multiple of 16");
    expect(moe_.K > 0 && moe_.K <= kMostSelected, "quantized experts: a token can have 1 to 32 experts");
  }

  // E experts on rows of H values, whose matrices begin at input `first`.
  Experts<typename Form::Matrix> given(const Tensors& call, size_t first, int E, int H) const {
    Experts<typename Form::Matrix> moe = moe_;
    moe.H = H, moe.E = E;
    expect(moe.K <= E && E <= kMostExperts && H % 8 == 0, "quantized experts: at most 1024, and a hidden size that is a multiple of 8");
    moe.gate_up.N = 2 * moe.I, moe.gate_up.K = H;
    moe.down.N = H, moe.down.K = moe.I;
    Form::give_experts(call, first, moe.gate_up, E);
    Form::give_experts(call, first + Form::kInputs, moe.down, E);
    return moe;
  }

  void compute(Call& call) {
    const auto shape = call.shape(0), logits = call.shape(1);
    expect(!shape.empty() && !logits.empty() && rows_of(shape) == rows_of(logits), "quantized experts: x [...,H] and the router's logits [...,E] do not fit");
    Experts<typename Form::Matrix> moe = given(call, 2, static_cast<int>(logits.back()), static_cast<int>(shape.back()));
    const T *x = call.input<T>(0), *routes = call.input<T>(1);
    T* y = call.output<T>(0, shape);
    const int M = rows_of(shape);
    if (M == 0) return;
    moe.tokens = std::min(M, kTokensTogether);
    const Scratch workspace(call, moe_workspace<T>(moe));
    for (int m = 0; m < M; m += kTokensTogether) {
      moe.tokens = std::min(M - m, kTokensTogether);
      run_moe(moe, x + size_t(m) * moe.H, routes + size_t(m) * moe.E, y + size_t(m) * moe.H, workspace.as<void>(), call.stream());
    }
  }

 private:
  Experts<typename Form::Matrix> moe_{};
};

// Many rows: so many weights are dequantized at a time, to be read again from the second-level cache.
constexpr int64_t kDequantizedTogether = 16 << 20;

// y [M, stride] = x [M,K] w^T + residual [M, stride] in its first N columns, over rows that `dequantize(first, rows, out)` gives, a multiple of 16 at
// a time.
template <typename T, typename Dequantize>
void product_of_parts(const Call& call, int N, int K, const T* x, const T* residual, T* y, int M, int stride, const Dequantize& dequantize) {
  const int together = int(std::max<int64_t>(1, kDequantizedTogether / K / kPanelRows)) * kPanelRows;
  const Scratch scratch(call, sizeof(T) * size_t(std::min(together, N)) * K);
  for (int n = 0; n < N; n += together) {
    const int rows = std::min(together, N - n);
    dequantize(n, rows, scratch.as<T>());
    dense_product<T>(call, x, scratch.as<T>(), residual != nullptr ? residual + n : nullptr, y + n, M, rows, K, stride);
  }
}

}  // namespace qwen
