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

#include "quant_form.h"
#include "ops.h"

namespace qwen {
namespace {

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
