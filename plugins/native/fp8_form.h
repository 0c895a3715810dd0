// FP8 matrices as the ops of fp8_ops.cc and chain_op.cc take them.
#pragma once

#include "cublas_lt.h"
#include "matrix_ops.h"

namespace qwen {

struct Fp8Form {
  using Matrix = Fp8Matrix;
  static constexpr size_t kInputs = 2;

  static Matrix of(const Attributes& info, const std::string& prefix) {
    Matrix w;
    const int64_t rows = info.integer(prefix + "rows");
    while (w.log_rows < 7 && int64_t(1) << w.log_rows < rows) w.log_rows++;
    expect(int64_t(1) << w.log_rows == rows, "the rows that share a scale must be a power of two up to 128");
    return w;
  }

  static void give(const Tensors& call, size_t input, Matrix& w) {
    const auto codes = call.shape(input), scales = call.shape(input + 1);
    expect(codes.size() == 2 && codes[0] >= w.N && codes[1] == w.stride(), "the FP8 codes do not have the size of their matrix");
    expect(scales.size() == 2 && scales[0] >= w.scale_rows() && scales[1] == w.scale_stride(), "the FP8 scales do not have the size of their matrix");
    take(call, input, w);
  }

  static void give_experts(const Tensors& call, size_t input, Matrix& w, int E) {
    expect(call.shape(input) == Shape({E, w.N, w.stride()}), "the FP8 codes do not have the size of their experts");
    expect(call.shape(input + 1) == Shape({E, w.scale_rows(), w.scale_stride()}), "the FP8 scales do not have the size of their experts");
    take(call, input, w);
  }

  template <typename T>
  static void put(const Matrix&, ChainPart<T>& part) {
    part.format = ChainFormat::kOther;
  }

  template <typename... Arguments>
  static void linear(Arguments... arguments) {
    fp8_linear(arguments...);
  }
  template <typename... Arguments>
  static void swiglu(Arguments... arguments) {
    fp8_swiglu(arguments...);
  }
  template <typename... Arguments>
  static void gather(Arguments... arguments) {
    fp8_gather(arguments...);
  }

  template <typename T>
  static bool has_many(const Matrix&, int) {
    return false;  // cuBLASLt multiplies in FP8
  }
  static size_t many_workspace(const Matrix&, int) { return 0; }
  template <typename... Arguments>
  static void linear_many(Arguments...) {}
  template <typename... Arguments>
  static void swiglu_many(Arguments...) {}

  template <typename T>
  static void large(const Call& call, const Matrix& w, const T* x, const T* residual, T* y, int M, int stride) {
    const int padded = (M + kFp8RowUnit - 1) / kFp8RowUnit * kFp8RowUnit;
    // Rows that fill up the last unit are computed in memory of their own.
    const bool apart = padded != M;
    const LtShape shape{Type<T>::element, true, padded, w.N, w.K, apart ? w.N : stride};
    const bool blocks = 1 << w.log_rows == kScaleColumns && w.K % kScaleColumns == 0 && w.N % 16 == 0 && stride % 8 == 0;
    const LtPlan plan = blocks ? lt_plan(call.cublas(), shape) : LtPlan{};
    if (!plan.found) {
      product_of_parts(call, w.N, w.K, x, residual, y, M, stride, [&](int first, int rows, T* out) { fp8_dequantize(w, first, rows, out, call.stream()); });
      return;
    }
    const size_t codes = aligned(size_t(padded) * w.K), scales = aligned(size_t(w.K / kScaleColumns) * padded * sizeof(float));
    const size_t results = apart ? aligned(size_t(padded) * w.N * sizeof(T)) : 0, width = size_t(w.N) * sizeof(T), pitch = size_t(stride) * sizeof(T);
    const Scratch scratch(call, codes + scales + results + plan.workspace);
    uint8_t* x_codes = scratch.as<uint8_t>();
    float* x_scales = reinterpret_cast<float*>(x_codes + codes);
    T* out = apart ? reinterpret_cast<T*>(x_codes + codes + scales) : y;
    fp8_activations(x, M, padded, w.K, x_codes, x_scales, call.stream());
    if (apart && residual != nullptr) {
      check(cudaMemcpy2DAsync(out, width, residual, pitch, width, M, cudaMemcpyDeviceToDevice, call.stream()), "cudaMemcpy2DAsync");
      residual = out;
    }
    lt_product(call.cublas(), plan, shape, x_codes, x_scales, w.codes, w.scales, residual, out, x_codes + codes + scales + results, call.stream());
    if (apart) check(cudaMemcpy2DAsync(y, pitch, out, width, width, M, cudaMemcpyDeviceToDevice, call.stream()), "cudaMemcpy2DAsync");
  }

 private:
  static void take(const Tensors& call, size_t input, Matrix& w) {
    w.codes = call.input<uint8_t>(input);
    w.scales = call.input<float>(input + 1);
  }

  static size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }
};

}  // namespace qwen
