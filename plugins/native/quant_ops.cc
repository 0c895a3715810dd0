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

#include <algorithm>

#include "ops.h"
#include "quant.cuh"
#include "quant_moe.cuh"
#include "rows.cuh"

namespace qwen {
namespace {

constexpr int kFewRows = 8;
// Many rows: so many weights are dequantized at a time, to be read again from the second-level cache.
constexpr int64_t kDequantizedTogether = 16 << 20;
constexpr int kTokensTogether = 1024;

QuantMatrix format_of(const Attributes& info, const std::string& prefix = "") {
  const auto value = [&](const char* name) { return static_cast<int>(info.integer(prefix + name)); };
  QuantMatrix w;
  w.bits = value("bits");
  w.block = value("block");
  w.zeros = value("zeros") != 0;
  w.wide_scales = value("wide_scales") != 0;
  expect(w.bits == 4 || w.bits == 8, "a quantized matrix must have 4 or 8 bits");
  expect(w.block == 32 || w.block == 64 || w.block == 128, "the block of a quantized matrix must be 32, 64 or 128");
  return w;
}

QuantMatrix matrix_of(const Attributes& info) {
  QuantMatrix w = format_of(info);
  w.N = static_cast<int>(info.integer("N"));
  w.K = static_cast<int>(info.integer("K"));
  expect(w.N > 0 && w.K > 0 && w.K % 8 == 0, "the columns of a quantized matrix must be a multiple of 8");
  return w;
}

QuantMatrix with_data(const Call& call, size_t input, QuantMatrix w) {
  const auto shape = call.shape(input);
  expect(shape.size() == 2 && shape[1] == w.panel_bytes() && shape[0] >= w.panels(), "the packed matrix does not have the size of its format");
  w.packed = call.input<uint8_t>(input);
  return w;
}

// y [M, stride] += x [M,K] w^T in its first N columns, for many rows.
template <typename T>
void large_product(const Call& call, const QuantMatrix& w, const T* x, float beta, T* y, int M, int stride) {
  const int together = int(std::max<int64_t>(1, kDequantizedTogether / w.K / kPanelRows)) * kPanelRows;
  const Scratch scratch(call, sizeof(T) * size_t(std::min(together, w.N)) * w.K);
  for (int n = 0; n < w.N; n += together) {
    const int rows = std::min(together, w.N - n);
    dequantize(w, n / kPanelRows, rows, scratch.as<T>(), call.stream());
    product(call.cublas(), Type<T>::element, x, scratch.as<T>(), beta, y + n, M, rows, w.K, stride);
  }
}

template <typename T>
class QuantLinearKernel {
 public:
  explicit QuantLinearKernel(const Attributes& info)
      : w_(matrix_of(info)), eps_(info.real("epsilon")) {}

  void compute(Call& call) {
    auto shape = call.shape(0);
    expect(!shape.empty() && shape.back() == w_.K, "QuantLinear: x [...,K] and the packed matrix do not fit");
    const QuantMatrix w = with_data(call, 1, w_);
    const int M = rows_of(shape), K = w.K;
    const T *x = call.input<T>(0), *residual = call.optional<T>(2), *norm = call.optional<T>(3), *tail = call.optional<T>(4);
    int tail_rows = 0;
    if (tail != nullptr) {
      const auto given = call.shape(4);
      expect(given.size() == 2 && given[1] == K, "QuantLinear: the tail must be [R,K]");
      tail_rows = static_cast<int>(given[0]);
    }
    const int width = w.N + tail_rows;
    shape.back() = width;
    T* y = call.output<T>(0, shape);
    if (M == 0) return;
    if (M <= kFewRows) {
      quant_linear(w, x, tail, tail_rows, residual, norm, eps_, y, M, call.stream());
      return;
    }
    if (residual != nullptr && residual != y)
      check(cudaMemcpyAsync(y, residual, sizeof(T) * M * size_t(width), cudaMemcpyDeviceToDevice, call.stream()), "cudaMemcpyAsync");
    const float beta = residual != nullptr ? 1.0f : 0.0f;
    const Scratch normed(call, norm != nullptr ? sizeof(T) * M * size_t(K) : 256);
    if (norm != nullptr) {
      rms_norm(x, norm, eps_, normed.as<T>(), M, K, call.stream());
      x = normed.as<T>();
    }
    large_product(call, w, x, beta, y, M, width);
    if (tail != nullptr) product(call.cublas(), Type<T>::element, x, tail, beta, y + w.N, M, tail_rows, K, width);
  }

 private:
  QuantMatrix w_;
  float eps_;
};

template <typename T>
class QuantSwiGluKernel {
 public:
  explicit QuantSwiGluKernel(const Attributes& info)
      : w_(matrix_of(info)), eps_(info.real("epsilon")) {
    expect(w_.N % (2 * kPanelRows) == 0, "QuantSwiGlu: gate and up must each have a multiple of 16 rows");
  }

  void compute(Call& call) {
    auto shape = call.shape(0);
    expect(!shape.empty() && shape.back() == w_.K, "QuantSwiGlu: x [...,K] and the packed matrix do not fit");
    const QuantMatrix w = with_data(call, 1, w_);
    const int M = rows_of(shape), N = w.N / 2, K = w.K;
    const T *x = call.input<T>(0), *norm = call.optional<T>(2);
    shape.back() = N;
    T* y = call.output<T>(0, shape);
    if (M == 0) return;
    if (M <= kFewRows) {
      quant_swiglu(w, x, norm, eps_, y, M, call.stream());
      return;
    }
    const size_t hidden = size_t(M) * w.N;
    const Scratch scratch(call, sizeof(T) * (hidden + (norm != nullptr ? size_t(M) * K : 0)));
    T* h = scratch.as<T>();
    if (norm != nullptr) {
      rms_norm(x, norm, eps_, h + hidden, M, K, call.stream());
      x = h + hidden;
    }
    large_product(call, w, x, 0.0f, h, M, w.N);
    gate(h, y, M, N, call.stream());
  }

 private:
  QuantMatrix w_;
  float eps_;
};

template <typename T>
class QuantGatherKernel {
 public:
  explicit QuantGatherKernel(const Attributes& info) : w_(matrix_of(info)) {}

  void compute(Call& call) {
    auto shape = call.shape(0);
    const QuantMatrix w = with_data(call, 1, w_);
    shape.push_back(w.K);
    T* y = call.output<T>(0, shape);
    if (const int count = rows_of(shape); count > 0) quant_gather(w, call.input<int64_t>(0), y, count, call.stream());
  }

 private:
  QuantMatrix w_;
};

template <typename T>
class QuantMoeKernel {
 public:
  explicit QuantMoeKernel(const Attributes& info) {
    moe_.K = static_cast<int>(info.integer("top_k"));
    moe_.I = static_cast<int>(info.integer("inner"));
    moe_.gate_up = format_of(info, "gate_up_");
    moe_.down = format_of(info, "down_");
    expect(moe_.I > 0 && moe_.I % kPanelRows == 0, "QuantMoe: the width of an expert must be a multiple of 16");
    expect(moe_.K > 0 && moe_.K <= kMostSelected, "QuantMoe: a token can have 1 to 32 experts");
  }

  void compute(Call& call) {
    const auto shape = call.shape(0), logits = call.shape(1);
    expect(!shape.empty() && !logits.empty() && rows_of(shape) == rows_of(logits), "QuantMoe: x [...,H] and the router's logits [...,E] do not fit");
    QuantMoe moe = moe_;
    moe.H = static_cast<int>(shape.back());
    moe.E = static_cast<int>(logits.back());
    expect(moe.K <= moe.E && moe.E <= kMostExperts && moe.H % 8 == 0, "QuantMoe: at most 1024 experts, and a hidden size that is a multiple of 8");
    moe.gate_up.N = 2 * moe.I, moe.gate_up.K = moe.H;
    moe.down.N = moe.H, moe.down.K = moe.I;
    moe.gate_up.packed = packed(call, 2, moe.gate_up, moe.E);
    moe.down.packed = packed(call, 3, moe.down, moe.E);
    const T *x = call.input<T>(0), *routes = call.input<T>(1);
    T* y = call.output<T>(0, shape);
    const int M = rows_of(shape);
    if (M == 0) return;
    moe.tokens = std::min(M, kTokensTogether);
    const Scratch workspace(call, quant_moe_workspace(moe, sizeof(T)));
    for (int m = 0; m < M; m += kTokensTogether) {
      moe.tokens = std::min(M - m, kTokensTogether);
      quant_moe(moe, x + size_t(m) * moe.H, routes + size_t(m) * moe.E, y + size_t(m) * moe.H, workspace.as<void>(), call.stream());
    }
  }

 private:
  static const uint8_t* packed(const Call& call, size_t input, const QuantMatrix& w, int E) {
    expect(call.shape(input) == std::vector<int64_t>({E, w.panels(), w.panel_bytes()}), "QuantMoe: the packed experts do not have the size of their format");
    return call.input<uint8_t>(input);
  }

  QuantMoe moe_{};
};

template <typename T>
void add(Domain& domain) {
  static const Operator<T, QuantLinearKernel<T>> linear({"QuantLinear", "TbT?T?T?", "T"});
  static const Operator<T, QuantSwiGluKernel<T>> swiglu({"QuantSwiGlu", "TbT?", "T"});
  static const Operator<T, QuantMoeKernel<T>> moe({"QuantMoe", "TTbb", "T"});
  domain.add(linear);
  domain.add(swiglu);
  domain.add(moe);
}

}  // namespace

void add_quantized(Domain& domain) {
  add<__half>(domain);
  add<__nv_bfloat16>(domain);
  // The types of its inputs do not determine that of its result, so there is one.
  static const Operator<__half, QuantGatherKernel<__half>> gather({"QuantGather", "lb", "T"});
  domain.add(gather);
}

}  // namespace qwen
