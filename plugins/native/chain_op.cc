// Chain: several nodes as one. Its parts are Linear, SwiGlu, DeltaNet, and the products over quantized and FP8 matrices, each with the inputs,
// results and kernel of its own op (plain_ops.h, delta_net_op.h, matrix_ops.h).
//
// inputs   64 of T, 24 of uint8, 48 of fp32, 4 of int64, in this order; all but the first may be left out
// outputs  32 of T, 8 of fp32; all but the first may be left out
// wiring   a text: what each part is, reads and makes (chain_wiring.h)
// p3_...   the attributes of the part with index 3
//
// Calls of up to 8 rows go to run_chain (chain.h), which may do the products between two mixers in one launch. Where it does not, and with more
// rows, the parts run one after the other, as their nodes would. Results that stay in the chain have memory for the time of the call.

#include <algorithm>
#include <cstring>
#include <memory>

#include "chain.h"
#include "chain_wiring.h"
#include "delta_net_op.h"
#include "fp8_form.h"
#include "ops.h"
#include "plain_ops.h"
#include "quant_form.h"

namespace qwen {
namespace {

constexpr size_t kOwn = 64, kBytes = 24, kFloats = 48, kIntegers = 4, kOwnResults = 32, kFloatResults = 8;

// The kernel of a part.
template <typename T>
class Part {
 public:
  virtual ~Part() = default;
  virtual std::vector<Shape> results(const Tensors& call) const = 0;
  virtual ChainPart<T> part(Call& call) const = 0;
  virtual void compute(Call& call) = 0;
};

template <typename T, typename Kernel>
class PartOf final : public Part<T> {
 public:
  explicit PartOf(const Attributes& info) : kernel_(info) {}
  std::vector<Shape> results(const Tensors& call) const override { return kernel_.results(call); }
  ChainPart<T> part(Call& call) const override { return kernel_.part(call); }
  void compute(Call& call) override { kernel_.compute(call); }

 private:
  Kernel kernel_;
};

// What a part can be: its inputs and results by type, as in the signature of its own op, and what makes its kernel.
template <typename T>
struct PartForm {
  const char *op, *inputs, *results;
  std::unique_ptr<Part<T>> (*make)(const Attributes& info);
};

template <typename T, typename Kernel>
std::unique_ptr<Part<T>> make(const Attributes& info) {
  return std::make_unique<PartOf<T, Kernel>>(info);
}

template <typename T>
const PartForm<T>& form_of(const std::string& op) {
  static const PartForm<T> forms[] = {
      {"Linear", "TTTT", "T", make<T, LinearKernel<T>>},
      {"SwiGlu", "TTT", "T", make<T, SwiGluKernel<T>>},
      {"DeltaNet", "TTffTTfTll", "TTf", make<T, DeltaNetKernel<T>>},
      {"QuantLinear", "TbTTT", "T", make<T, MatrixLinearKernel<PackedForm, T>>},
      {"QuantSwiGlu", "TbT", "T", make<T, MatrixSwiGluKernel<PackedForm, T>>},
      {"Fp8Linear", "TbfTTT", "T", make<T, MatrixLinearKernel<Fp8Form, T>>},
      {"Fp8SwiGlu", "TbfT", "T", make<T, MatrixSwiGluKernel<Fp8Form, T>>},
  };
  for (const PartForm<T>& form : forms) {
    if (op == form.op) return form;
  }
  throw std::runtime_error("Chain: this library has no part " + op);
}

// Where results lie in the memory of a call. Many rows: a place is taken again behind the last part that reads it.
class Places {
 public:
  explicit Places(bool again) : again_(again) {}

  // A place for `bytes`, made by the part `first`, read last by the part `last`.
  size_t take(size_t bytes, size_t first, size_t last) {
    bytes = (bytes + 255) / 256 * 256;
    size_t begin = again_ ? 0 : end_;
    for (bool moved = again_; moved;) {
      moved = false;
      for (const Place& other : taken_) {
        if (other.last < first || begin + bytes <= other.begin || other.end <= begin) continue;
        begin = other.end, moved = true;
      }
    }
    taken_.push_back({begin, begin + bytes, last});
    end_ = std::max(end_, begin + bytes);
    return begin;
  }

  size_t bytes() const { return end_; }

 private:
  struct Place {
    size_t begin, end, last;
  };
  bool again_;
  size_t end_ = 0;
  std::vector<Place> taken_;
};

template <typename T>
class ChainKernel {
 public:
  explicit ChainKernel(const Attributes& info) : wires_(chain_wires(info.text("wiring"))) {
    for (size_t i = 0; i < wires_.size(); i++) {
      const ChainWires& wires = wires_[i];
      const PartForm<T>& form = form_of<T>(wires.op);
      parts_.push_back(form.make(info.of_part("p" + std::to_string(i) + "_")));
      expect(wires.inputs.size() <= std::strlen(form.inputs), "Chain: a part has too many inputs");
      for (size_t k = 0; k < wires.inputs.size(); k++) {
        const ChainSlot& from = wires.inputs[k];
        if (from.kind == 'v') {
          expect(from.number < results_.size(), "Chain: a part reads a result that no part before it makes");
          results_[from.number].last = i;
        }
        const char kind = from.kind == 'v' ? results_[from.number].kind : from.kind;
        expect(kind == '-' || kind == form.inputs[k], "Chain: a part reads an input of another type");
      }
      expect(wires.results.size() == std::strlen(form.results), "Chain: a part has another number of results");
      for (size_t k = 0; k < wires.results.size(); k++) {
        const ChainSlot& to = wires.results[k];
        expect(to.kind == '-' || to.kind == form.results[k], "Chain: a part makes an output of another type");
        results_.push_back({to, form.results[k], i, k, i});
      }
    }
  }

  void compute(Call& call) {
    std::vector<Given> all = given(call);
    const int64_t rows = rows_of(all[0].results[0].shape);
    const bool few = 0 < rows && rows <= kFewColumns;
    Places places(!few);
    std::vector<size_t> at;
    for (const Result& result : results_) {
      at.push_back(result.slot.kind == '-' ? places.take(bytes_of(result, all), result.part, result.last) : 0);
    }
    const Scratch memory(call, std::max<size_t>(places.bytes(), 256));
    for (size_t v = 0; v < results_.size(); v++) {
      const Result& result = results_[v];
      TensorAt& tensor = all[result.part].results[result.index];
      tensor.data = result.slot.kind == '-' ? memory.as<char>() + at[v] : call.output<void>(output_of(result.slot), tensor.shape);
    }
    for (size_t i = 0; i < parts_.size(); i++) {
      for (size_t k = 0; k < all[i].inputs.size(); k++) {
        if (const ChainSlot& from = wires_[i].inputs[k]; from.kind == 'v') all[i].inputs[k].data = tensor_of(from, all).data;
      }
    }
    if (few && in_few_launches(call, all, static_cast<int>(rows))) return;
    for (size_t i = 0; i < parts_.size(); i++) {
      Call one(call, all[i].inputs, all[i].results);
      parts_[i]->compute(one);
    }
  }

 private:
  // A result of a part: where it goes, its type, the part and which of its results, and the last part that reads it.
  struct Result {
    ChainSlot slot;
    char kind;
    size_t part, index, last;
  };

  // The tensors of a part.
  struct Given {
    std::vector<TensorAt> inputs, results;
  };

  // The tensors of all parts; what they make has its shape, and no memory yet.
  std::vector<Given> given(const Call& call) const {
    std::vector<Given> all(parts_.size());
    for (size_t i = 0; i < parts_.size(); i++) {
      for (const ChainSlot& from : wires_[i].inputs) {
        if (from.kind == '-') {
          all[i].inputs.push_back({});
        } else if (from.kind == 'v') {
          all[i].inputs.push_back(tensor_of(from, all));
        } else {
          const size_t input = input_of(from);
          all[i].inputs.push_back({true, call.shape(input), const_cast<void*>(call.input<void>(input))});
        }
      }
      const std::vector<Shape> shapes = parts_[i]->results(Tensors(nullptr, all[i].inputs, all[i].results));
      for (const Shape& shape : shapes) all[i].results.push_back({true, shape, nullptr});
    }
    return all;
  }

  const TensorAt& tensor_of(const ChainSlot& from, const std::vector<Given>& all) const {
    return all[results_[from.number].part].results[results_[from.number].index];
  }

  bool in_few_launches(const Call& call, const std::vector<Given>& all, int rows) {
    std::vector<ChainPart<T>> described;
    for (size_t i = 0; i < parts_.size(); i++) {
      Call one(call, all[i].inputs, all[i].results);
      ChainPart<T> part = parts_[i]->part(one);
      part.x_from = made_by(part.x, all), part.residual_from = made_by(part.residual, all);
      part.leaves = wires_[i].results[0].kind != '-';
      described.push_back(part);
    }
    return run_chain(described, rows, memory_, call.stream());
  }

  // The part whose first result lies there, -1: none.
  static int made_by(const T* data, const std::vector<Given>& all) {
    for (size_t i = 0; data != nullptr && i < all.size(); i++) {
      if (all[i].results[0].data == data) return static_cast<int>(i);
    }
    return -1;
  }

  static size_t bytes_of(const Result& result, const std::vector<Given>& all) {
    size_t bytes = result.kind == 'f' ? sizeof(float) : sizeof(T);
    for (const int64_t size : all[result.part].results[result.index].shape) bytes *= static_cast<size_t>(size);
    return bytes;
  }

  static size_t input_of(const ChainSlot& slot) {
    switch (slot.kind) {
      case 'T': return within(slot, kOwn);
      case 'b': return kOwn + within(slot, kBytes);
      case 'f': return kOwn + kBytes + within(slot, kFloats);
      case 'l': return kOwn + kBytes + kFloats + within(slot, kIntegers);
    }
    throw std::runtime_error("Chain: there are no inputs of this type");
  }

  static size_t output_of(const ChainSlot& slot) {
    switch (slot.kind) {
      case 'T': return within(slot, kOwnResults);
      case 'f': return kOwnResults + within(slot, kFloatResults);
    }
    throw std::runtime_error("Chain: there are no outputs of this type");
  }

  static size_t within(const ChainSlot& slot, size_t count) {
    expect(slot.number < count, "Chain: the node has fewer tensors of this type");
    return slot.number;
  }

  std::vector<ChainWires> wires_;
  std::vector<std::unique_ptr<Part<T>>> parts_;
  std::vector<Result> results_;
  ChainMemory memory_;
};

// Tensors of one type. The first of T stands in front of them, and is not left out: it says which of the two ops of this name a node is.
std::string optional(char kind, size_t count) {
  std::string all;
  for (size_t i = 0; i < count; i++) all += std::string(1, kind) + "?";
  return all;
}

template <typename T>
void add(Domain& domain) {
  static const std::string inputs = "T" + optional('T', kOwn - 1) + optional('b', kBytes) + optional('f', kFloats) + optional('l', kIntegers);
  static const std::string outputs = "T" + optional('T', kOwnResults - 1) + optional('f', kFloatResults);
  static const Operator<T, ChainKernel<T>> chain({"Chain", inputs.c_str(), outputs.c_str()});
  domain.add(chain);
}

}  // namespace

void add_chains(Domain& domain) {
  add<__half>(domain);
  add<__nv_bfloat16>(domain);
}

}  // namespace qwen
