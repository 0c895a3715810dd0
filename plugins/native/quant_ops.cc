// Products with quantized matrices (quant.cuh), with the attributes and the packed layout of the CPU plugin's ops of the same names. `packed`
// is u8[panels, bytes of a panel]; it may have more rows than N, of which the first N count.
// Attributes: bits (4, 8), block (32, 64, 128), N, K, zeros and wide_scales (0, 1), epsilon.
//
// QuantLinear  x T[...,K], packed, residual T[...,N+R]?, norm T[K]?, tail T[R,K]? -> y T[...,N+R]
//              y = rms_norm(x) [w; tail]^T + residual
// QuantSwiGlu  x T[...,K], packed of w [2N,K] (gate rows, then up rows; N a multiple of 16), norm T[K]? -> y T[...,N]
//              y = silu(rms_norm(x) gate^T) * (rms_norm(x) up^T); the attribute N counts rows of w
// QuantGather  ids i64[...], packed -> y fp16[...,K]
// QuantMoe     x T[...,H], logits T[...,E], packed gate_up u8[E, panels, bytes of a panel], packed down -> y T[...,H]
//              attributes top_k, inner (I), and bits, block, zeros, wide_scales after gate_up_ and down_

#include "matrix_ops.h"
#include "ops.h"

namespace qwen {
namespace {

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

  static void give(const Call& call, size_t input, Matrix& w) {
    const auto shape = call.shape(input);
    expect(shape.size() == 2 && shape[1] == w.panel_bytes() && shape[0] >= w.panels(), "the packed matrix does not have the size of its format");
    w.packed = call.input<uint8_t>(input);
  }

  static void give_experts(const Call& call, size_t input, Matrix& w, int E) {
    expect(call.shape(input) == Shape({E, w.panels(), w.panel_bytes()}), "the packed experts do not have the size of their format");
    w.packed = call.input<uint8_t>(input);
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

  static bool has_many(int M) { return has_quant_many(M); }
  template <typename T>
  static size_t many_workspace(const Matrix& w, int M) {
    return qwen::many_workspace<T>(w, M);
  }
  template <typename... Arguments>
  static void linear_many(Arguments... arguments) {
    quant_linear_many(arguments...);
  }
  template <typename... Arguments>
  static void swiglu_many(Arguments... arguments) {
    quant_swiglu_many(arguments...);
  }

  template <typename T>
  static void large(const Call& call, const Matrix& w, const T* x, float beta, T* y, int M, int stride) {
    product_of_parts(call, w.N, w.K, x, beta, y, M, stride,
                     [&](int first, int rows, T* out) { dequantize(w, first / kPanelRows, rows, out, call.stream()); });
  }
};

template <typename T>
void add(Domain& domain) {
  static const Operator<T, MatrixLinearKernel<PackedForm, T>> linear({"QuantLinear", "TbT?T?T?", "T"});
  static const Operator<T, MatrixSwiGluKernel<PackedForm, T>> swiglu({"QuantSwiGlu", "TbT?", "T"});
  static const Operator<T, MatrixMoeKernel<PackedForm, T>> moe({"QuantMoe", "TTbb", "T"});
  domain.add(linear);
  domain.add(swiglu);
  domain.add(moe);
}

}  // namespace

void add_quantized(Domain& domain) {
  add<__half>(domain);
  add<__nv_bfloat16>(domain);
  // The types of its inputs do not determine that of its result, so there is one.
  static const Operator<__half, MatrixGatherKernel<PackedForm, __half>> gather({"QuantGather", "lb", "T"});
  domain.add(gather);
}

}  // namespace qwen
