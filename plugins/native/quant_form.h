// Quantized matrices as the ops of quant_ops.cc and chain_op.cc take them.
#pragma once

#include "matrix_ops.h"

namespace qwen {

struct PackedForm {
  using Matrix = QuantMatrix;
  static constexpr size_t kInputs = 1;

  static Matrix of(const Attributes& info, const std::string& prefix) {
    const auto value = [&](const char* name) { return static_cast<int>(info.integer(prefix + name)); };
    Matrix w;
    w.bits = value("bits");
    w.block = value("block");
    w.zeros = value("zeros") != 0;
    w.wide_scales = value("wide_scales") != 0;
    expect(w.bits == 4 || w.bits == 8, "a quantized matrix must have 4 or 8 bits");
    expect(w.block == 32 || w.block == 64 || w.block == 128, "the block of a quantized matrix must be 32, 64 or 128");
    return w;
  }

  static void give(const Tensors& call, size_t input, Matrix& w) {
    const auto shape = call.shape(input);
    expect(shape.size() == 2 && shape[1] == w.panel_bytes() && shape[0] >= w.panels(), "the packed matrix does not have the size of its format");
    w.packed = call.input<uint8_t>(input);
  }

  static void give_experts(const Tensors& call, size_t input, Matrix& w, int E) {
    expect(call.shape(input) == Shape({E, w.panels(), w.panel_bytes()}), "the packed experts do not have the size of their format");
    w.packed = call.input<uint8_t>(input);
  }

  template <typename T>
  static void put(const Matrix& w, ChainPart<T>& part) {
    part.format = ChainFormat::kQuant, part.quant = w;
  }

  template <typename... Arguments>
  static void linear(Arguments... arguments) {
    quant_linear(arguments...);
  }
  template <typename... Arguments>
  static void swiglu(Arguments... arguments) {
    quant_swiglu(arguments...);
  }
  template <typename... Arguments>
  static void gather(Arguments... arguments) {
    quant_gather(arguments...);
  }

  template <typename T>
  static bool has_many(const Matrix& w, int M) {
    return has_quant_many<T>(w, M);
  }
  static size_t many_workspace(const Matrix& w, int M) { return qwen::many_workspace(w, M); }
  template <typename... Arguments>
  static void linear_many(Arguments... arguments) {
    quant_linear_many(arguments...);
  }
  template <typename... Arguments>
  static void swiglu_many(Arguments... arguments) {
    quant_swiglu_many(arguments...);
  }

  template <typename T>
  static void large(const Call& call, const Matrix& w, const T* x, const T* residual, T* y, int M, int stride) {
    product_of_parts(call, w.N, w.K, x, residual, y, M, stride,
                     [&](int first, int rows, T* out) { dequantize(w, first / kPanelRows, rows, out, call.stream()); });
  }
};

}  // namespace qwen
