// GatedAttention (attention.cuh). Attributes num_heads, kv_num_heads, scale, epsilon.
//
// q T[B,T,Hq*D], k and v T[B,T,Hkv*D], gate T[B,T,Hq*D]; or q alone, with q|k|v|gate behind each other in every token
// q_norm, k_norm T[D]; cos, sin T[S',R/2] or T[B,S',R/2]; k_cache, v_cache [B,Hkv,S,W]; length i64[B]
//   ->  y T[B,T,Hq*D], k_cache', v_cache', which are meant to be the memory of k_cache and v_cache
// The caches are of T with W = D, float8e4m3fn with W = D, or int8 with W = D + 16: codes, and behind them the row's factor in fp32.

#include <algorithm>

#include "attention.cuh"
#include "ops.h"
#include "zeroed.h"

namespace qwen {
namespace {

template <typename T, typename Cache, typename Row>
class GatedAttentionKernel {
 public:
  explicit GatedAttentionKernel(const Attributes& info)
      : heads_(int(info.integer("num_heads"))), kv_heads_(int(info.integer("kv_num_heads"))), scale_(info.real("scale")), eps_(info.real("epsilon")) {
    expect(0 < kv_heads_ && kv_heads_ <= heads_ && heads_ % kv_heads_ == 0, "GatedAttention: num_heads must be a multiple of kv_num_heads");
    int number = 0;
    check(cudaGetDevice(&number), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&device_.major, cudaDevAttrComputeCapabilityMajor, number), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&device_.processors, cudaDevAttrMultiProcessorCount, number), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&device_.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, number), "cudaDeviceGetAttribute");
    device_.counters = zeroed<unsigned>(kAttentionCounters);
  }
  ~GatedAttentionKernel() { cudaFree(device_.counters); }
  GatedAttentionKernel(const GatedAttentionKernel&) = delete;
  GatedAttentionKernel& operator=(const GatedAttentionKernel&) = delete;

  void compute(Call& call) {
    const auto q = call.shape(kQ), cache = call.shape(kKCache), table = call.shape(kCos);
    expect(q.size() == 3 && cache.size() == 4 && cache[0] == q[0] && cache[1] == kv_heads_ && call.shape(kVCache) == cache,
           "GatedAttention: the caches are not [B,Hkv,S,D]");
    expect(call.shape(kQNorm).size() == 1 && call.shape(kKNorm) == call.shape(kQNorm), "GatedAttention: the norms are not [D]");
    const int64_t B = q[0], tokens = q[1], D = call.shape(kQNorm)[0], wide = heads_ * D, narrow = kv_heads_ * D;
    expect(takes_attention_head(D), "GatedAttention: heads must have 32, 64, 128 or 256 values");
    expect(Row::kPlain || takes_attention_head_of_bytes(D), "GatedAttention: with caches of bytes heads must have 64 or 256 values");
    expect(cache[3] == D + Row::kBehind, "GatedAttention: the caches are not [B,Hkv,S,D]");
    expect(call.shape(kSin) == table && (table.size() == 2 || (table.size() == 3 && table[0] == B)),
           "GatedAttention: cos and sin are not [S',R/2] or [B,S',R/2]");
    expect(0 < table.back() && 2 * table.back() <= D && table.back() % (D / 32) == 0, "GatedAttention: the values that turn are a multiple of D/16, D at most");
    expect(call.shape(kLength) == Shape{B}, "GatedAttention: length is not [B]");
    AttentionShape shape{};
    shape.B = int(B), shape.T = int(tokens), shape.Hq = heads_, shape.Hkv = kv_heads_, shape.S = int(cache[2]), shape.D = int(D);
    shape.R = int(2 * table.back());
    shape.room = int(std::min(cache[2], table[table.size() - 2]));
    expect(tokens <= shape.room, "GatedAttention: the new tokens do not fit the caches or the tables");
    shape.table_stride = table.size() == 3 ? table[1] * table[2] : 0;
    AttentionTensors<T> in{};
    in.q = call.input<T>(kQ);
    if (call.has(kK)) {
      expect(call.has(kV) && call.has(kGate), "GatedAttention: k, v and gate are given together or not at all");
      expect(q[2] == wide && call.shape(kGate) == q, "GatedAttention: q and gate are not [B,T,Hq*D]");
      expect(call.shape(kK) == Shape{B, tokens, narrow} && call.shape(kV) == call.shape(kK), "GatedAttention: k and v are not [B,T,Hkv*D]");
      in.k = call.input<T>(kK), in.v = call.input<T>(kV), in.gate = call.input<T>(kGate);
      shape.q_stride = shape.gate_stride = int(wide), shape.kv_stride = int(narrow);
    } else {
      expect(q[2] == 2 * (wide + narrow), "GatedAttention: the packed projection is not [B,T,2*(Hq+Hkv)*D]");
      in.k = in.q + wide, in.v = in.k + narrow, in.gate = in.v + narrow;
      shape.q_stride = shape.kv_stride = shape.gate_stride = int(q[2]);
    }
    in.q_norm = call.input<T>(kQNorm), in.k_norm = call.input<T>(kKNorm), in.cos = call.input<T>(kCos), in.sin = call.input<T>(kSin);
    in.length = call.input<int64_t>(kLength);
    in.y = call.output<T>(0, {B, tokens, wide});
    in.k_cache = in_place(call, kKCache, 1, cache), in.v_cache = in_place(call, kVCache, 2, cache);
    if (B == 0 || tokens == 0) return;
    const size_t bytes = attention_workspace(shape, device_);
    const Scratch workspace(call, bytes > 0 ? bytes : 1);
    gated_attention<T, Cache>(shape, in, scale_, eps_, device_, workspace.as<void>(), call.stream());
  }

 private:
  enum Input : size_t { kQ, kK, kV, kGate, kQNorm, kKNorm, kCos, kSin, kKCache, kVCache, kLength };

  // The output, which has what the input has.
  static unsigned char* in_place(Call& call, size_t input, size_t output, const Shape& shape) {
    const auto* before = call.input<unsigned char>(input);
    auto* after = call.output<unsigned char>(output, shape);
    size_t bytes = Row::kElement;
    for (const int64_t size : shape) bytes *= size_t(size);
    if (after != before) check(cudaMemcpyAsync(after, before, bytes, cudaMemcpyDeviceToDevice, call.stream()), "cudaMemcpyAsync");
    return after;
  }

  int heads_, kv_heads_;
  float scale_, eps_;
  AttentionDevice device_{};
};

template <typename T>
void add(Domain& domain) {
  static const Operator<T, GatedAttentionKernel<T, PlainCache, PlainRow>> plain({"GatedAttention", "TT?T?T?TTTTTTl", "TTT"});
  static const Operator<T, GatedAttentionKernel<T, Int8Cache, Int8Row>> int8({"GatedAttention", "TT?T?T?TTTTccl", "Tcc"});
  static const Operator<T, GatedAttentionKernel<T, Fp8Cache, Fp8Row>> fp8({"GatedAttention", "TT?T?T?TTTT88l", "T88"});
  domain.add(plain);
  domain.add(int8);
  domain.add(fp8);
}

}  // namespace

void add_attention(Domain& domain) {
  add<__half>(domain);
  add<__nv_bfloat16>(domain);
}

}  // namespace qwen
