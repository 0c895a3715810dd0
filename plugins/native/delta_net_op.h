// The kernel of DeltaNet, in fp16, bf16 and fp32.
#pragma once

#include "chain.h"
#include "delta_net.cuh"
#include "operator.h"
#include "zeroed.h"

namespace qwen {

// packed [B,T,C+Hv*D+2Hv] (qkv | z | a | b), conv [C,4], a_log f32[Hv], dt_bias f32[Hv], norm [D], history [B,3,C],
// state f32[B,Hv,D,D] (V-major), and for a transaction pending [B,P,width], accepted i64[B], commit i64[B]
//   ->  y [B,T,Hv*D], history', state'
template <typename T>
class DeltaNetKernel {
 public:
  explicit DeltaNetKernel(const Attributes& info) {
    eps_ = info.real("epsilon");
    key_heads_ = static_cast<int>(info.integer("key_heads"));
    arrivals_ = zeroed<int>(kArrivals);
  }
  ~DeltaNetKernel() { cudaFree(arrivals_); }

  std::vector<Shape> results(const Tensors& call) const {
    const auto packed = call.shape(0), state = call.shape(6), history = call.shape(5);
    expect(packed.size() == 3 && state.size() == 4 && state[2] == state[3] && takes_head(state[3]), "DeltaNet: heads must have 64 or 128 values");
    const DeltaNetShape shape = shape_of(packed, state);
    expect(shape.Hv % shape.Hk == 0 && shape.width() == packed[2] && history[2] == shape.channels(), "DeltaNet: the packed projection does not fit the heads");
    expect(call.shape(1).back() == kTaps, "DeltaNet: the convolution must have 4 taps");
    const bool transaction = call.has(7);
    expect(transaction == call.has(8) && transaction == call.has(9), "DeltaNet: pending, accepted and commit are given together or not at all");
    if (transaction) {
      const auto pending = call.shape(7), sequences = std::vector<int64_t>{packed[0]};
      expect(pending.size() == 3 && pending[0] == packed[0] && pending[2] == packed[2], "DeltaNet: pending is not shaped like the packed projection");
      expect(call.shape(8) == sequences && call.shape(9) == sequences, "DeltaNet: accepted and commit have one number per sequence");
    }
    return {{packed[0], packed[1], state[1] * state[3]}, history, state};
  }

  // What a call computes, with the memory of its results.
  ChainPart<T> part(Call& call) const {
    const auto shapes = results(call);
    ChainPart<T> p{};
    p.kind = ChainKind::kDeltaNet, p.format = ChainFormat::kPlain, p.eps = eps_, p.y = call.output<T>(0, shapes[0]);
    p.shape = shape_of(call.shape(0), call.shape(6));
    if (call.has(7)) p.shape.P = int(call.shape(7)[1]);
    p.in = {call.input<T>(0),
            call.input<T>(1),
            call.input<float>(2),
            call.input<float>(3),
            call.input<T>(4),
            call.input<T>(5),
            call.input<float>(6),
            call.optional<T>(7),
            call.optional<int64_t>(8),
            call.optional<int64_t>(9),
            p.y,
            call.output<T>(1, shapes[1]),
            call.output<float>(2, shapes[2])};
    p.x = p.in.packed, p.arrivals = arrivals_, p.arrivals_size = kArrivals;
    return p;
  }

  void compute(Call& call) {
    const ChainPart<T> p = part(call);
    const DeltaNetShape& shape = p.shape;
    const DeltaNetTensors<T>& tensors = p.in;
    if (shape.B == 0) return;
    const size_t bytes = delta_net_workspace(shape);
    if (bytes == 0) {
      delta_net(shape, tensors, eps_, nullptr, arrivals_, kArrivals, call.stream());
      return;
    }
    const Scratch workspace(call, bytes);
    delta_net(shape, tensors, eps_, workspace.as<void>(), arrivals_, kArrivals, call.stream());
  }

 private:
  DeltaNetShape shape_of(const Shape& packed, const Shape& state) const {
    return {int(packed[0]), int(packed[1]), key_heads_, int(state[1]), 0, int(state[3])};
  }

  static constexpr int kArrivals = 256 * 64;  // sequences times key heads
  float eps_ = 0.0f;
  int key_heads_ = 0;
  int* arrivals_ = nullptr;
};

}  // namespace qwen
