// Products with FP8 matrices (fp8.cuh). A matrix [N,K] is two inputs: codes u8[rows, K rounded up to 16], and scales f32[rows of scales, K / 128
// rounded up to 4]; both may have more rows than N needs, of which the first count.
// Attributes: rows (that share a scale: a power of two up to 128), N, K, epsilon.
//
// Fp8Linear  x T[...,K], codes, scales, residual T[...,N+R]?, norm T[K]?, tail T[R,K]? -> y T[...,N+R]
//            y = rms_norm(x) [w; tail]^T + residual
// Fp8SwiGlu  x T[...,K], codes and scales of w [2N,K] (gate rows, then up rows; N a multiple of 16), norm T[K]? -> y T[...,N]
//            y = silu(rms_norm(x) gate^T) * (rms_norm(x) up^T); the attribute N counts rows of w
// Fp8Gather  ids i64[...], codes, scales -> y fp16[...,K]
// Fp8Moe     x T[...,H], logits T[...,E], codes and scales of gate_up, each [E, as of one matrix], codes and scales of down -> y T[...,H]
//            attributes top_k, inner (I), gate_up_rows, down_rows
//
// More than 8 rows are multiplied in FP8 where cuBLASLt does that (cublas_lt.h): activations are rounded to codes with a scale per 128 values of a
// row, as the FP8 releases are meant to be run (activation_scheme "dynamic"). Elsewhere weights are dequantized, a part at a time.

#include "fp8_form.h"
#include "ops.h"

namespace qwen {
namespace {

template <typename T>
void add(Domain& domain) {
  static const Operator<T, MatrixLinearKernel<Fp8Form, T>> linear({"Fp8Linear", "TbfT?T?T?", "T"});
  static const Operator<T, MatrixSwiGluKernel<Fp8Form, T>> swiglu({"Fp8SwiGlu", "TbfT?", "T"});
  static const Operator<T, MatrixMoeKernel<Fp8Form, T>> moe({"Fp8Moe", "TTbfbf", "T"});
  domain.add(linear);
  domain.add(swiglu);
  domain.add(moe);
}

}  // namespace

void add_fp8(Domain& domain) {
  add<__half>(domain);
  add<__nv_bfloat16>(domain);
  static const Operator<__half, MatrixGatherKernel<Fp8Form, __half>> gather({"Fp8Gather", "lbf", "T"});
  domain.add(gather);
}

}  // namespace qwen
