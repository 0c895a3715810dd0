// DeltaNetTransaction: everything of a Gated DeltaNet mixer between its projections (delta_net.h).
//
//   inputs   qkvz f32[B,T,C+Hv*Dv]  ab f32[B,T,2*Hv]  conv_weight f32[K,C]  decay f32[Hv]  dt_bias f32[Hv]  norm f32[Dv]
//            conv_history f32[B,K-1,C]  state f32[B,Hv,Dk,Dv]
//            all or none: pending_qkvz f32[B,P,C+Hv*Dv]  pending_ab f32[B,P,2*Hv]  accepted i64[B]  commit i64[B]
//   outputs  y f32[B,T,Hv*Dv]  conv_history'  state'       the last two may be bound to the memory of their inputs
// K is 2, 3 or 4. Outputs y at t >= commit > 0 are 0.

#include "delta_net.h"

#include <memory>

#include "operator.h"
#include "ops.h"

namespace qwen {
namespace {

enum Input { kQkvz, kAb, kConvWeight, kDecay, kDtBias, kNorm, kHistory, kState, kPendingQkvz, kPendingAb, kAccepted, kCommit };

float* scratch(size_t floats) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local size_t capacity = 0;
  if (capacity < floats) {
    memory.reset(new float[floats + 16]);
    capacity = floats;
  }
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t(63));
}

class DeltaNetKernel {
 public:
  explicit DeltaNetKernel(const Attributes& info)
      : key_heads_(info.integer("key_heads")), epsilon_(info.real("epsilon")) {}

  void compute(Call& call) {
    const Shape qkvz = call.shape(kQkvz), conv = call.shape(kConvWeight), history = call.shape(kHistory), state = call.shape(kState);
    expect(qkvz.size() == 3 && conv.size() == 2 && state.size() == 4,
           "DeltaNetTransaction: qkvz is [B,T,*], conv_weight [K,C], state [B,Hv,Dk,Dv]");
    DeltaNet net{};
    net.B = qkvz[0], net.T = qkvz[1], net.K = conv[0], net.Hk = key_heads_, net.Hv = state[1], net.Dk = state[2], net.Dv = state[3];
    const int64_t B = net.B, Hv = net.Hv;
    expect(net.Hk > 0 && Hv % net.Hk == 0, "DeltaNetTransaction: value heads must be a multiple of key heads");
    expect(2 <= net.K && net.K <= 4, "DeltaNetTransaction: the convolution must have 2, 3 or 4 taps");
    expect(conv[1] == net.channels() && qkvz[2] == net.width() && state[0] == B,
           "DeltaNetTransaction: qkvz, conv_weight and state do not fit");
    expect(call.shape(kAb) == Shape{B, net.T, 2 * Hv}, "DeltaNetTransaction: ab is not [B,T,2*Hv]");
    expect(history == Shape{B, net.K - 1, net.channels()}, "DeltaNetTransaction: conv_history is not [B,K-1,C]");
    expect(call.shape(kDecay) == Shape{Hv} && call.shape(kDtBias) == Shape{Hv} && call.shape(kNorm) == Shape{net.Dv},
           "DeltaNetTransaction: decay and dt_bias are not [Hv], or norm is not [Dv]");
    const bool complete = call.has(kPendingQkvz);
    for (size_t i = kPendingAb; i <= kCommit; i++)
      expect(call.has(i) == complete, "DeltaNetTransaction: pending_qkvz, pending_ab, accepted and commit come together");
    if (complete) {
      const Shape pending = call.shape(kPendingQkvz);
      expect(pending.size() == 3 && pending[0] == B && pending[2] == qkvz[2], "DeltaNetTransaction: pending_qkvz is not [B,P,C+Hv*Dv]");
      net.P = pending[1];
      expect(call.shape(kPendingAb) == Shape{B, net.P, 2 * Hv}, "DeltaNetTransaction: pending_ab is not [B,P,2*Hv]");
      expect(call.shape(kAccepted) == Shape{B} && call.shape(kCommit) == Shape{B}, "DeltaNetTransaction: accepted and commit are not [B]");
      net.pending_qkvz = call.input<float>(kPendingQkvz), net.pending_ab = call.input<float>(kPendingAb);
      net.accepted = call.input<int64_t>(kAccepted), net.commit = call.input<int64_t>(kCommit);
      for (int64_t b = 0; b < B; b++)
        expect(0 <= net.accepted[b] && net.accepted[b] <= net.P && 0 <= net.commit[b] && net.commit[b] <= net.T,
               "DeltaNetTransaction: accepted must be in 0..P and commit in 0..T");
    }
    net.qkvz = call.input<float>(kQkvz), net.ab = call.input<float>(kAb), net.conv_weight = call.input<float>(kConvWeight);
    net.decay = call.input<float>(kDecay), net.dt_bias = call.input<float>(kDtBias), net.norm = call.input<float>(kNorm);
    net.conv_history = call.input<float>(kHistory), net.state = call.input<float>(kState);
    net.y = call.output<float>(0, {B, net.T, Hv * net.Dv});
    net.conv_history_out = call.output<float>(1, history), net.state_out = call.output<float>(2, state);
    net.epsilon = epsilon_;

    std::unique_ptr<std::atomic<int>[]> many;
    std::atomic<int> few[64] = {};
    if (B * net.Hk > 64) many.reset(new std::atomic<int>[size_t(B * net.Hk)]());
    net.readers = many ? many.get() : few;
    const auto head = QWEN_BEST(delta_net_head);
    const size_t floats = delta_net_scratch(net);
    call.parallel(size_t(B * Hv), [&](size_t task) { head(net, int64_t(task), scratch(floats)); });
  }

 private:
  const int64_t key_heads_;
  const float epsilon_;
};

}  // namespace

void add_delta_net(Domain& domain) {
  static const Operator<DeltaNetKernel> delta_net({"DeltaNetTransaction", "ffffffff" "f?f?l?l?", "fff"});
  domain.add(delta_net);
}

}  // namespace qwen
