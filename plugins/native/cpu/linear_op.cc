// Linear: y = norm(x) w^T + residual. SwiGlu: y = silu(norm(x) w_gate^T) * (norm(x) w_up^T). Activations are fp32, weights fp32 or bf16.

#include <algorithm>
#include <memory>

#include "bf16_form.h"
#include "operator.h"
#include "ops.h"
#include "product.h"
#include "quant.h"

namespace qwen {
namespace {

// What one task reads of the weight: short enough that the threads end together, long enough that starting a task costs nothing.
constexpr int64_t kTaskWeights = 64 << 10, kTasks = 512;
// With many rows a task is longer anyway, and reads all of x.
constexpr int64_t kManyRows = 16;
// Values that one thread packs; more are packed by all threads.
constexpr int64_t kFewValues = 32 << 10;

// The rows of x in the order of the kernels, in memory that the thread keeps.
const float* pack(const Call& call, const float* x, const float* norm, float eps, int64_t M, int64_t K) {
  static const auto packed_size = QWEN_BEST(packed_size);
  static const auto packed_groups = QWEN_BEST(packed_groups);
  static const auto pack_rows = QWEN_BEST(pack_rows);
  thread_local std::unique_ptr<float[]> memory;
  thread_local size_t capacity = 0;
  const size_t size = packed_size(M, K), groups = packed_groups(M);
  if (M == 1 && norm == nullptr && size == size_t(K)) return x;
  if (capacity < size) memory.reset(new float[capacity = size]);
  float* out = memory.get();
  if (M * K <= kFewValues)
    pack_rows(x, norm, eps, M, K, 0, groups, out);
  else
    call.parallel(groups, [=](size_t group) { pack_rows(x, norm, eps, M, K, group, group + 1, out); });
  return out;
}

void run(const Call& call, const Product& p) {
  static const auto product = QWEN_BEST(product);
  const int64_t weights = p.M > kManyRows ? 2 * kTaskWeights : kTaskWeights;
  const int64_t rows = weights / int64_t(p.K) / (p.gated ? 2 : 1), N = int64_t(p.N);
  const size_t columns = size_t(std::max({int64_t(4), rows, N / kTasks}) / 4 * 4);
  call.parallel((p.N + columns - 1) / columns,
                [&](size_t task) { product(p, task * columns, std::min(p.N, (task + 1) * columns)); });
}

// Rows of a weight [.,K] for tiles of bf16; `rows` is the length of a part of it.
struct Opener {
  const uint16_t* w;
  int64_t rows, K;

  void operator()(int64_t panel, int set, uint16_t* columns) const {
    static const auto open = QWEN_TILES(bf16_columns);
    const int64_t first = panel * kBf16Lines;
    open(w + (set * rows + first) * K, int(std::min<int64_t>(kBf16Lines, rows - first)), K, columns);
  }
};

// x f32[...,K], w [N,K], residual f32[...,N]?, norm f32[K]?  ->  y f32[...,N]
template <bool bf16>
class LinearKernel {
 public:
  explicit LinearKernel(const Attributes& info) : eps_(info.real("epsilon")) {}

  void compute(Call& call) {
    Shape shape = call.shape(0);
    const Shape weight = call.shape(1);
    expect(!shape.empty() && weight.size() == 2 && shape.back() == weight[1], "Linear: x [...,K] and w [N,K] do not fit");
    const int64_t M = rows_of(shape), N = weight[0], K = weight[1];
    shape.back() = N;
    expect(!call.has(2) || call.shape(2) == shape, "Linear: the residual has another shape than the result");
    expect(!call.has(3) || call.shape(3) == Shape{K}, "Linear: norm must be [K]");
    float* y = call.output<float>(0, shape);
    if (M == 0 || N == 0) return;
    if (bf16 && in_bf16_tiles(M)) {
      const float* residual = call.optional<float>(2);
      return over_bf16_tiles<1>(call, Bf16Rows(call, call.input<float>(0), call.optional<float>(3), eps_, M, K), (N + kBf16Lines - 1) / kBf16Lines,
                                Opener{call.input<uint16_t>(1), N, K}, [&](int64_t panel, int64_t row, int rows, const float* values, const float*) {
                                  write_results(values, rows, residual, y, row, panel * kBf16Lines, N);
                                });
    }
    const float* x = pack(call, call.input<float>(0), call.optional<float>(3), eps_, M, K);
    run(call, {x, call.input<void>(1), bf16, false, call.optional<float>(2), y, size_t(M), size_t(N), size_t(K)});
  }

 private:
  float eps_;
};

// x f32[...,K], w [2N,K] (gate rows first), norm f32[K]?  ->  y f32[...,N]
template <bool bf16>
class SwiGluKernel {
 public:
  explicit SwiGluKernel(const Attributes& info) : eps_(info.real("epsilon")) {}

  void compute(Call& call) {
    Shape shape = call.shape(0);
    const Shape weight = call.shape(1);
    expect(!shape.empty() && weight.size() == 2 && shape.back() == weight[1] && weight[0] % 2 == 0,
           "SwiGlu: x [...,K] and w [2N,K] do not fit");
    const int64_t M = rows_of(shape), N = weight[0] / 2, K = weight[1];
    shape.back() = N;
    expect(!call.has(2) || call.shape(2) == Shape{K}, "SwiGlu: norm must be [K]");
    float* y = call.output<float>(0, shape);
    if (M == 0 || N == 0) return;
    if (bf16 && in_bf16_tiles(M))
      return over_bf16_tiles<2>(call, Bf16Rows(call, call.input<float>(0), call.optional<float>(2), eps_, M, K), (N + kBf16Lines - 1) / kBf16Lines,
                                Opener{call.input<uint16_t>(1), N, K}, [&](int64_t panel, int64_t row, int rows, float* gate, float* up) {
                                  static const auto swiglu = QWEN_BEST(quant_swiglu);
                                  swiglu(gate, up, rows * kBf16Lines, gate);
                                  write_results(gate, rows, nullptr, y, row, panel * kBf16Lines, N);
                                });
    const float* x = pack(call, call.input<float>(0), call.optional<float>(2), eps_, M, K);
    run(call, {x, call.input<void>(1), bf16, true, nullptr, y, size_t(M), size_t(N), size_t(K)});
  }

 private:
  float eps_;
};

template <bool bf16>
void add(Domain& domain) {
  static const Operator<LinearKernel<bf16>> linear({"Linear", bf16 ? "fhf?f?" : "fff?f?", "f"});
  static const Operator<SwiGluKernel<bf16>> swiglu({"SwiGlu", bf16 ? "fhf?" : "fff?", "f"});
  domain.add(linear);
  domain.add(swiglu);
}

}  // namespace

void add_linear(Domain& domain) {
  add<false>(domain);
  add<true>(domain);
}

}  // namespace qwen
