// TopLogits: what sampling looks at, found while the logits are still in the cache.
#include <algorithm>

#include "operator.h"
#include "ops.h"
#include "top_logits.h"

namespace qwen {

namespace {

// logits f32 [...,V]  ->  values f32 [...,K], ids i32 [...,K], sorted; K = min(attribute k, V)
class TopLogitsKernel {
 public:
  explicit TopLogitsKernel(const Attributes& info) : k_(info.integer("k")) {
    expect(k_ > 0, "TopLogits: k must be positive");
  }

  void compute(Call& call) {
    auto shape = call.shape(0);
    expect(!shape.empty() && shape.back() > 0 && shape.back() <= INT32_MAX, "TopLogits: logits must be [...,V]");
    const size_t rows = rows_of(shape), V = shape.back(), K = std::min<int64_t>(k_, shape.back());
    const float* x = call.input<float>(0);
    shape.back() = K;
    float* values = call.output<float>(0, shape);
    int32_t* ids = call.output<int32_t>(1, shape);
    if (rows == 0) return;
    // A step has one row and must not leave threads without work; more rows are work enough.
    const size_t parts = rows == 1 && V >= 1 << 16 ? 2 : 1, width = (V + parts - 1) / parts;
    std::vector<Entry> found(rows * parts * K);
    std::vector<size_t> counts(rows * parts);
    call.parallel(rows * parts, [&](size_t task) {
      const size_t start = task % parts * width, n = std::min(V, start + width) - start;
      counts[task] = top_logits_(x + task / parts * V + start, n, static_cast<int32_t>(start), K, found.data() + task * K);
    });
    for (size_t row = 0; row < rows; row++) {
      Entry* all = found.data() + row * parts * K;
      if (parts == 2) {
        std::copy_n(all + K, counts[2 * row + 1], all + counts[2 * row]);
        std::inplace_merge(all, all + counts[2 * row], all + counts[2 * row] + counts[2 * row + 1], before);
      }
      for (size_t i = 0; i < K; i++) {
        values[row * K + i] = all[i].value;
        ids[row * K + i] = all[i].id;
      }
    }
  }

 private:
  int64_t k_;
  decltype(QWEN_BEST(top_logits)) top_logits_ = QWEN_BEST(top_logits);
};

}  // namespace

void add_top_logits(Domain& domain) {
  static const Operator<TopLogitsKernel> op({"TopLogits", "f", "fi"});
  domain.add(op);
}

}  // namespace qwen
