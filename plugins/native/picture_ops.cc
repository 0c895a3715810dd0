// The ops of the vision tower.
//
// PictureAttention (attribute num_heads)  qkv T[B,L,3*H*D], bias T[3*H*D]?, cos and sin f32[...,D/2] of L rows  ->  y T[B,L,H*D]
// ResidualNorm (attribute epsilon)        x T[...,K], bias T[K], residual T[...,K], weight T[K], offset T[K]  ->  x + bias + residual, its norm
// BiasGelu                                x T[...,N], bias T[N]  ->  gelu(x + bias), the form with tanh

#include <climits>

#include "ops.h"
#include "picture.cuh"

namespace qwen {
namespace {

template <typename T>
class PictureAttentionKernel {
 public:
  explicit PictureAttentionKernel(const Attributes& info) : heads_(int(info.integer("num_heads"))) {
    expect(heads_ > 0, "PictureAttention: num_heads must be positive");
  }

  void compute(Call& call) {
    const auto qkv = call.shape(0), table = call.shape(2);
    expect(qkv.size() == 3 && qkv[2] % (3 * heads_) == 0, "PictureAttention: qkv is not [B,L,3*H*D]");
    const int64_t B = qkv[0], L = qkv[1], D = qkv[2] / (3 * heads_);
    expect(D % 8 == 0 && D <= 128, "PictureAttention: heads have a multiple of 8 values, 128 at most");
    expect(table.back() * 2 == D && rows_of(table) == L && call.shape(3) == table, "PictureAttention: cos and sin are not [L,D/2]");
    expect(B * L <= INT_MAX && B * heads_ <= 65535, "PictureAttention: too many patches or slices for one call");
    const T* bias = call.optional<T>(1);
    expect(bias == nullptr || call.shape(1) == Shape{qkv[2]}, "PictureAttention: the bias is not [3*H*D]");
    T* y = call.output<T>(0, {B, L, heads_ * D});
    if (B == 0 || L == 0) return;
    const PictureShape shape{int(B), int(L), heads_, int(D)};
    const Scratch workspace(call, picture_workspace(shape));
    picture_attention(shape, call.input<T>(0), bias, call.input<float>(2), call.input<float>(3), y, workspace.as<void>(), call.stream());
  }

 private:
  int heads_;
};

template <typename T>
class ResidualNormKernel {
 public:
  explicit ResidualNormKernel(const Attributes& info) : eps_(info.real("epsilon")) {}

  void compute(Call& call) {
    const auto shape = call.shape(0);
    expect(!shape.empty() && call.shape(2) == shape, "ResidualNorm: x and the residual are not of one shape");
    const int64_t K = shape.back();
    expect(K % 8 == 0 && K <= 4096, "ResidualNorm: rows have a multiple of 8 values, 4096 at most");
    for (const size_t row : {1, 3, 4}) expect(call.shape(row) == Shape{K}, "ResidualNorm: bias, weight and offset are not [K]");
    T *total = call.output<T>(0, shape), *y = call.output<T>(1, shape);
    const int M = int(rows_of(shape));
    if (M == 0) return;
    residual_norm(call.input<T>(0), call.input<T>(1), call.input<T>(2), call.input<T>(3), call.input<T>(4), eps_, total, y, M, int(K), call.stream());
  }

 private:
  float eps_;
};

template <typename T>
class BiasGeluKernel {
 public:
  explicit BiasGeluKernel(const Attributes&) {}

  void compute(Call& call) {
    const auto shape = call.shape(0);
    expect(!shape.empty() && shape.back() % 8 == 0 && call.shape(1) == Shape{shape.back()}, "BiasGelu: x [...,N] and bias [N] do not fit");
    T* y = call.output<T>(0, shape);
    const int M = int(rows_of(shape));
    if (M > 0) bias_gelu(call.input<T>(0), call.input<T>(1), y, M, int(shape.back()), call.stream());
  }
};

template <typename T>
void add(Domain& domain) {
  static const Operator<T, PictureAttentionKernel<T>> attention({"PictureAttention", "TT?ff", "T"});
  static const Operator<T, ResidualNormKernel<T>> norm({"ResidualNorm", "TTTTT", "TT"});
  static const Operator<T, BiasGeluKernel<T>> gelu({"BiasGelu", "TT", "T"});
  domain.add(attention);
  domain.add(norm);
  domain.add(gelu);
}

}  // namespace

void add_pictures(Domain& domain) {
  add<__half>(domain);
  add<__nv_bfloat16>(domain);
}

}  // namespace qwen
