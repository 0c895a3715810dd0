// Moe and QuantMoe: the routed experts of a mixture-of-experts layer.
//
//   y = sum over the selected experts e, ascending, of weight_e down_e (silu(gate_e x) * up_e x)             (routing.h)
//
// Moe       x f32[...,H], router logits f32[...,E], gate_up [E,2I,H] and down [E,H,I], fp32 or bf16 -> y f32[...,H]
// QuantMoe  the same, gate_up and down u8[E, panels, bytes of a panel] (quant.h), I a multiple of 16; attributes inner (I) and, with the
//           prefixes gate_up_ and down_, bits, block, zeros and wide_scales
// Attribute of both: top_k.
//
// Tokens are grouped by expert, so that each selected expert's weights are read once per call (once per kWorkspace of activations).
// A token's result has the same bits whatever other tokens are in the call: products of rows are independent of each other (product.h,
// quant.h), and a token's experts are summed in their order.

#include <memory>

#include "experts.h"
#include "operator.h"
#include "ops.h"
#include "routing.h"

namespace qwen {
namespace {

constexpr size_t kWorkspace = 64 << 20;    // bytes of activations that are prepared at a time
constexpr size_t kTaskBytes = 128 << 10;   // what one task reads of one expert's weights
constexpr size_t kRoutedTogether = 16;     // tokens that one task routes
constexpr size_t kFewVisits = 16;          // so few are prepared by the calling thread

// Memory of one thread that calls session.Run, kept from call to call.
char* workspace(size_t bytes) {
  static thread_local std::unique_ptr<char[]> memory;
  static thread_local size_t capacity = 0;
  if (capacity < bytes + 64) memory.reset(new char[capacity = bytes + 64]);
  const auto address = reinterpret_cast<uintptr_t>(memory.get());
  return memory.get() + (64 - address % 64) % 64;
}

Routing route(const Parallel& parallel, const float* logits, size_t tokens, size_t E, size_t K) {
  std::vector<Candidate> chosen(tokens * K);
  parallel((tokens + kRoutedTogether - 1) / kRoutedTogether, [&](size_t task) {
    static thread_local std::vector<Candidate> scratch;
    for (size_t t = task * kRoutedTogether; t < std::min(tokens, (task + 1) * kRoutedTogether); t++)
      choose_experts(logits + t * E, E, K, scratch, chosen.data() + t * K);
  });
  return group_by_expert(chosen, tokens, E, K);
}

// Rows of activations by expert, in the order of the kernels.
template <typename Experts>
class Inputs {
 public:
  Inputs(const Experts& experts, const Routing& routing, char* memory) : experts_(experts), routing_(routing), memory_(memory) {
    size_t offset = 0;
    for (const Group& group : routing.groups) {
      offsets_.push_back(offset);
      offset += experts.input_bytes(group.rows());
    }
    bytes_ = offset;
  }

  size_t bytes() const { return bytes_; }
  const void* operator[](size_t group) const { return memory_ + (shared_ ? 0 : offsets_[group]); }

  // row(visit) is the row of activations of a visit.
  template <typename Row>
  void prepare(const Parallel& parallel, const Row& row) {
    const auto one = [&](size_t g) {
      static thread_local std::vector<const float*> rows;
      const Group& group = routing_.groups[g];
      rows.clear();
      for (int32_t v = group.begin; v < group.end; v++) rows.push_back(row(size_t(v)));
      experts_.prepare(rows.data(), rows.size(), memory_ + offsets_[g]);
    };
    if (routing_.visits.size() > kFewVisits) return parallel(routing_.groups.size(), one);
    for (size_t g = 0; g < routing_.groups.size(); g++) one(g);
  }

  // All groups read the one row `x`.
  void share(const float* x) {
    shared_ = true;
    experts_.prepare(&x, 1, memory_);
  }

 private:
  const Experts& experts_;
  const Routing& routing_;
  char* memory_;
  std::vector<size_t> offsets_;
  size_t bytes_ = 0;
  bool shared_ = false;
};

// A multiple of the unit that is worth a task.
template <typename Experts>
size_t columns_of_task(const Experts& experts, size_t matrices) {
  const size_t columns = kTaskBytes / (experts.row_bytes() * matrices);
  return std::max(columns / Experts::unit, size_t(1)) * Experts::unit;
}

// Tokens that are few enough for the workspace.
template <typename Experts>
void run(const Parallel& parallel, const Experts& gate_up, const Experts& down, size_t H, size_t I, const float* x, const Routing& routing,
         size_t tokens, float* y) {
  const std::vector<Group>& groups = routing.groups;
  Inputs<Experts> sizes(gate_up, routing, nullptr), inner_sizes(down, routing, nullptr);
  const size_t hidden_bytes = aligned(routing.visits.size() * I * sizeof(float));
  char* memory = workspace(sizes.bytes() + hidden_bytes + inner_sizes.bytes());
  Inputs<Experts> in(gate_up, routing, memory), inner(down, routing, memory + sizes.bytes() + hidden_bytes);
  float* hidden = reinterpret_cast<float*>(memory + sizes.bytes());

  if (tokens == 1)
    in.share(x);
  else
    in.prepare(parallel, [&](size_t visit) { return x + size_t(routing.visits[visit].token) * H; });

  const size_t columns = columns_of_task(gate_up, 2), parts = (I + columns - 1) / columns;
  parallel(groups.size() * parts, [&](size_t task) {
    const size_t g = task / parts, first = task % parts * columns;
    gate_up.swiglu(size_t(groups[g].expert), in[g], groups[g].rows(), first, std::min(I, first + columns), hidden + size_t(groups[g].begin) * I);
  });

  inner.prepare(parallel, [&](size_t visit) { return hidden + visit * I; });

  const size_t width = columns_of_task(down, 1);
  parallel((H + width - 1) / width, [&](size_t task) {
    static thread_local std::vector<float> out;
    const size_t first = task * width, last = std::min(H, first + width), count = last - first;
    for (size_t t = 0; t < tokens; t++) std::fill_n(y + t * H + first, count, 0.0f);
    for (size_t g = 0; g < groups.size(); g++) {
      out.resize(groups[g].rows() * count);
      down.product(size_t(groups[g].expert), inner[g], groups[g].rows(), first, last, out.data());
      const float* row = out.data();
      for (int32_t v = groups[g].begin; v < groups[g].end; v++, row += count) {
        const Visit visit = routing.visits[size_t(v)];
        float* to = y + size_t(visit.token) * H + first;
        for (size_t i = 0; i < count; i++) to[i] += visit.weight * row[i];
      }
    }
  });
}

// Sizes of a call, checked.
struct Sizes {
  size_t tokens, H, E, K;

  Sizes(const Call& call, int64_t top_k) {
    const Shape x = call.shape(0), logits = call.shape(1);
    expect(!x.empty() && !logits.empty() && rows_of(x) == rows_of(logits), "Moe: x [...,H] and the router's logits [...,E] do not fit");
    expect(top_k > 0 && top_k <= logits.back(), "Moe: top_k must be in 1..E");
    tokens = size_t(rows_of(x)), H = size_t(x.back()), E = size_t(logits.back()), K = size_t(top_k);
  }
};

template <typename Experts>
void run_all(Call& call, const Sizes& s, const Experts& gate_up, const Experts& down, size_t I) {
  const float *x = call.input<float>(0), *logits = call.input<float>(1);
  float* y = call.output<float>(0, call.shape(0));
  const size_t visit = gate_up.input_bytes(1) + down.input_bytes(1) + I * sizeof(float);
  const size_t together = std::max<size_t>(kRoutedTogether, kWorkspace / (visit * s.K));
  for (size_t start = 0; start < s.tokens; start += together) {
    const size_t tokens = std::min(together, s.tokens - start);
    const Routing routing = route(call.parallel, logits + start * s.E, tokens, s.E, s.K);
    run(call.parallel, gate_up, down, s.H, I, x + start * s.H, routing, tokens, y + start * s.H);
  }
}

template <bool gate_up_bf16, bool down_bf16>
class MoeKernel {
 public:
  explicit MoeKernel(const Attributes& info) : top_k_(info.integer("top_k")) {}

  void compute(Call& call) {
    const Sizes s(call, top_k_);
    const Shape gate_up = call.shape(2), down = call.shape(3);
    const int64_t I = down.size() == 3 ? down[2] : 0;
    expect(I > 0 && gate_up == Shape({int64_t(s.E), 2 * I, int64_t(s.H)}) && down == Shape({int64_t(s.E), int64_t(s.H), I}),
           "Moe: gate_up must be [E,2I,H] and down [E,H,I]");
    const PlainExperts up{call.input<void>(2), gate_up_bf16, 2 * size_t(I), s.H}, back{call.input<void>(3), down_bf16, s.H, size_t(I)};
    run_all(call, s, up, back, size_t(I));
  }

 private:
  int64_t top_k_;
};

class QuantMoeKernel {
 public:
  explicit QuantMoeKernel(const Attributes& info)
      : top_k_(info.integer("top_k")),
        inner_(info.integer("inner")),
        gate_up_(format_of(info, "gate_up_")),
        down_(format_of(info, "down_")) {
    expect(inner_ > 0 && inner_ % kPanelRows == 0, "QuantMoe: the width of an expert must be a multiple of 16");
  }

  void compute(Call& call) {
    const Sizes s(call, top_k_);
    const QuantFormat gate_up = sized(gate_up_, 2 * inner_, int64_t(s.H)), down = sized(down_, int64_t(s.H), inner_);
    run_all(call, s, QuantExperts{packed(call, 2, gate_up, s.E), gate_up}, QuantExperts{packed(call, 3, down, s.E), down}, size_t(inner_));
  }

 private:
  static QuantFormat format_of(const Attributes& info, const std::string& prefix) {
    const auto value = [&](const char* name) { return info.integer(prefix + name); };
    QuantFormat format;
    format.bits = int(value("bits"));
    format.block = int(value("block"));
    format.zeros = value("zeros") != 0;
    format.wide_scales = value("wide_scales") != 0;
    expect(format.bits == 4 || format.bits == 8, "QuantMoe: experts must have 4 or 8 bits");
    expect(format.block >= kQuantUnit && format.block <= 256 && format.block % kQuantUnit == 0, "QuantMoe: the block must be a multiple of 32, up to 256");
    return format;
  }

  static QuantFormat sized(QuantFormat format, int64_t N, int64_t K) {
    format.N = N;
    format.K = K;
    return format;
  }

  static const uint8_t* packed(const Call& call, size_t input, const QuantFormat& format, size_t E) {
    expect(call.shape(input) == Shape({int64_t(E), format.panels(), int64_t(format.panel_bytes())}), "QuantMoe: the packed experts do not have the size of their format");
    return call.input<uint8_t>(input);
  }

  int64_t top_k_, inner_;
  QuantFormat gate_up_, down_;
};

}  // namespace

void add_moe(Domain& domain) {
  static const Operator<MoeKernel<false, false>> fp32({"Moe", "ffff", "f"});
  static const Operator<MoeKernel<true, true>> bf16({"Moe", "ffhh", "f"});
  static const Operator<MoeKernel<true, false>> bf16_fp32({"Moe", "ffhf", "f"});
  static const Operator<MoeKernel<false, true>> fp32_bf16({"Moe", "fffh", "f"});
  static const Operator<QuantMoeKernel> quant({"QuantMoe", "ffbb", "f"});
  domain.add(fp32);
  domain.add(bf16);
  domain.add(bf16_fp32);
  domain.add(fp32_bf16);
  domain.add(quant);
}

}  // namespace qwen
