// Linear: y = x w^T, the plain reference form. x f32[...,K], w f32[N,K] -> y f32[...,N]

#include "operator.h"
#include "ops.h"

namespace qwen {
namespace {

class LinearKernel {
 public:
  explicit LinearKernel(const Ort::ConstKernelInfo&) {}

  void compute(Call& call) {
    Shape shape = call.shape(0);
    const Shape weight = call.shape(1);
    expect(!shape.empty() && weight.size() == 2 && shape.back() == weight[1], "Linear: x [...,K] and w [N,K] do not fit");
    const int64_t M = rows_of(shape), N = weight[0], K = weight[1];
    const float *x = call.input<float>(0), *w = call.input<float>(1);
    shape.back() = N;
    float* y = call.output<float>(0, shape);
    call.parallel(size_t(N), [&](size_t n) {
      for (int64_t m = 0; m < M; m++) {
        float sum = 0;
        for (int64_t k = 0; k < K; k++) sum += x[m * K + k] * w[n * K + k];
        y[m * N + n] = sum;
      }
    });
  }
};

}  // namespace

void add_linear(Ort::CustomOpDomain& domain) {
  static const Operator<LinearKernel> linear({"Linear", "ff", "f"});
  domain.Add(&linear);
}

}  // namespace qwen
