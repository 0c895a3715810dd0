// GatedAttention: head norms, rotation, the write into the cache, causal attention and the output gate (attention.h).
//
//   inputs   q f32[B,T,Hq*D]  k f32[B,T,Hkv*D]  v f32[B,T,Hkv*D]  gate f32[B,T,Hq*D]  q_norm f32[D]  k_norm f32[D]
//            cos, sin f32[S',R/2] or f32[B,S',R/2], a row per cache slot  k_cache, v_cache [B,Hkv,S,W]  length i64[B]
//   outputs  y f32[B,T,Hq*D]  k_cache'  v_cache'      the last two are bound to the memory of their inputs, or hold a copy of them
// Sequence b has length[b] tokens in slots 0 .. length[b]-1, and its new ones are written behind them. The cost follows from the lengths, not
// from S.
// The caches are f32 or f16 with W = D, float8e4m3fn with W = D, or int8 with W = D + 16: codes, and behind them the row's factor in fp32.

#include <memory>
#include <vector>

#include "attention.h"
#include "operator.h"
#include "ops.h"

namespace qwen {
namespace {

enum Input { kQ, kK, kV, kGate, kQNorm, kKNorm, kCos, kSin, kKCache, kVCache, kLength };

// With fewer tasks than this the blocks of a sequence are tasks of their own, as far as their results fit into so many floats.
constexpr int64_t kManyTasks = 32, kMostPartials = 16 << 20;
// Rows of the cache that one thread writes; more are written by all.
constexpr int64_t kFewRows = 64, kRowsOfTask = 16;

// Memory that a thread keeps.
struct Memory {
  float* at_least(size_t floats) {
    if (capacity < floats) {
      memory.reset(new float[floats + 16]);
      capacity = floats;
    }
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t(63));
  }
  std::unique_ptr<float[]> memory;
  size_t capacity = 0;
};

float* scratch(size_t floats) {
  thread_local Memory memory;
  return memory.at_least(floats);
}

// The blocks of some queries: tasks first .. first + blocks - 1, results from float `at` on. The last task to end merges them.
struct Blocks {
  Queries queries;
  int64_t first;
  size_t at;
};

template <CacheFormat FORMAT>
class GatedAttentionKernel {
 public:
  explicit GatedAttentionKernel(const Attributes& info)
      : heads_(info.integer("num_heads")), kv_heads_(info.integer("kv_num_heads")), scale_(info.real("scale")),
        epsilon_(info.real("epsilon")) {}

  void compute(Call& call) {
    Attention a = read(call);
    if (a.B == 0 || a.T == 0) return;
    write(call, a);
    std::vector<Queries> all;
    all.reserve(size_t(a.B * a.Hkv * a.parts()));
    int64_t tasks = 0;
    size_t floats = 0;
    // The last tokens see most, so they begin.
    for (int64_t first = (a.parts() - 1) * a.tokens(); first >= 0; first -= a.tokens())
      for (int64_t b = 0; b < a.B; b++)
        for (int64_t head = 0; head < a.Hkv; head++) {
          all.push_back({b, head, first, std::min(a.T, first + a.tokens())});
          tasks += all.back().blocks(a);
          floats += size_t(all.back().blocks(a)) * Partial::floats(all.back().rows(a), a.width());
        }
    const bool split = int64_t(all.size()) < kManyTasks && tasks > int64_t(all.size()) && int64_t(floats) <= kMostPartials;
    split ? run_blocks(call, a, all, tasks, floats) : run_rows(call, a, all);
  }

 private:
  Attention read(Call& call) const {
    const Shape q = call.shape(kQ), cache = call.shape(kKCache), cos = call.shape(kCos);
    expect(q.size() == 3 && cache.size() == 4, "GatedAttention: q is [B,T,Hq*D] and k_cache [B,Hkv,S,D]");
    expect(call.shape(kQNorm).size() == 1 && call.shape(kKNorm) == call.shape(kQNorm), "GatedAttention: the norms are not [D]");
    Attention a{};
    a.B = q[0], a.T = q[1], a.Hq = heads_, a.Hkv = kv_heads_, a.S = cache[2], a.D = call.shape(kQNorm).back(), a.format = FORMAT;
    expect(a.Hkv > 0 && a.Hq > 0 && a.Hq % a.Hkv == 0, "GatedAttention: num_heads must be a multiple of kv_num_heads");
    expect(q[2] == a.Hq * a.D && call.shape(kGate) == q, "GatedAttention: q and gate are not [B,T,Hq*D]");
    expect(call.shape(kK) == Shape{a.B, a.T, a.Hkv * a.D} && call.shape(kV) == call.shape(kK),
           "GatedAttention: k and v are not [B,T,Hkv*D]");
    const int64_t width = FORMAT == CacheFormat::kInt8 ? a.D + kScaleBytes : a.D;
    expect(cache == Shape{a.B, a.Hkv, a.S, width} && call.shape(kVCache) == cache, "GatedAttention: the caches are not [B,Hkv,S,D]");
    const bool own = cos.size() == 3;
    expect((own || cos.size() == 2) && call.shape(kSin) == cos && (!own || cos[0] == a.B),
           "GatedAttention: cos and sin are not [S',R/2] or [B,S',R/2]");
    a.half = cos.back();
    const int64_t rows = cos[cos.size() - 2];
    a.table = own ? rows * a.half : 0;
    expect(2 * a.half <= a.D, "GatedAttention: more values turn than a head has");
    expect(call.shape(kLength) == Shape{a.B}, "GatedAttention: length is not [B]");
    a.length = call.input<int64_t>(kLength);
    for (int64_t b = 0; b < a.B; b++)
      expect(a.length[b] >= 0 && a.length[b] + a.T <= std::min(a.S, rows), "GatedAttention: the new tokens do not fit the cache or the tables");
    a.q = call.input<float>(kQ), a.k = call.input<float>(kK), a.v = call.input<float>(kV), a.gate = call.input<float>(kGate);
    a.q_norm = call.input<float>(kQNorm), a.k_norm = call.input<float>(kKNorm);
    a.cos = call.input<float>(kCos), a.sin = call.input<float>(kSin);
    a.y = call.output<float>(0, q);
    a.k_cache = cache_of(call, kKCache, 1, cache), a.v_cache = cache_of(call, kVCache, 2, cache);
    a.scale = scale_, a.epsilon = epsilon_;
    return a;
  }

  static unsigned char* cache_of(Call& call, size_t input, size_t output, const Shape& shape) {
    constexpr int64_t kElement = cache_row(FORMAT, 1) - (FORMAT == CacheFormat::kInt8 ? kScaleBytes : 0);
    const unsigned char* from = call.input<unsigned char>(input);
    unsigned char* to = call.output<unsigned char>(output, shape);
    if (to != from) std::copy(from, from + rows_of(shape) * shape.back() * kElement, to);
    return to;
  }

  static void write(const Call& call, const Attention& a) {
    static const auto write = QWEN_BEST(attention_write);
    const int64_t rows = a.B * a.T * a.Hkv, step = rows <= kFewRows ? rows : kRowsOfTask;
    call.parallel(size_t((rows + step - 1) / step), [&](size_t task) {
      for (int64_t row = int64_t(task) * step; row < std::min(rows, int64_t(task + 1) * step); row++)
        write(a, row / a.Hkv / a.T, row / a.Hkv % a.T, row % a.Hkv, scratch(size_t(a.D)));
    });
  }

  static void run_rows(const Call& call, const Attention& a, const std::vector<Queries>& all) {
    static const auto rows = QWEN_BEST(attention_rows);
    const size_t floats = attention_scratch(a);
    call.parallel(all.size(), [&](size_t task) { rows(a, all[task], scratch(floats)); });
  }

  static void run_blocks(const Call& call, const Attention& a, const std::vector<Queries>& all, int64_t tasks, size_t floats) {
    static const auto block_of = QWEN_BEST(attention_block);
    static const auto merge = QWEN_BEST(attention_merge);
    thread_local Memory results;
    float* const memory = results.at_least(floats);
    std::vector<Blocks> parts;
    std::vector<uint32_t> part_of;
    parts.reserve(all.size()), part_of.reserve(size_t(tasks));
    size_t at = 0;
    for (const Queries& queries : all) {
      parts.push_back({queries, int64_t(part_of.size()), at});
      part_of.insert(part_of.end(), size_t(queries.blocks(a)), uint32_t(parts.size() - 1));
      at += size_t(queries.blocks(a)) * Partial::floats(queries.rows(a), a.width());
    }
    std::atomic<int64_t> done[kManyTasks] = {};
    const size_t needed = attention_scratch(a);
    call.parallel(size_t(tasks), [&](size_t task) {
      const size_t which = part_of[task];
      const Blocks& part = parts[which];
      const int64_t block = int64_t(task) - part.first, rows = part.queries.rows(a);
      float* const own = memory + part.at + size_t(block) * Partial::floats(rows, a.width());
      block_of(a, part.queries, block, Partial::at(own, rows, a.width()), scratch(needed));
      if (done[which].fetch_add(1, std::memory_order_acq_rel) + 1 == part.queries.blocks(a)) merge(a, part.queries, memory + part.at);
    });
  }

  const int64_t heads_, kv_heads_;
  const float scale_, epsilon_;
};

}  // namespace

void add_attention(Domain& domain) {
  static const Operator<GatedAttentionKernel<CacheFormat::kFp32>> fp32({"GatedAttention", "ffffffffffl", "fff"});
  static const Operator<GatedAttentionKernel<CacheFormat::kFp16>> fp16({"GatedAttention", "ffffffffeel", "fee"});
  static const Operator<GatedAttentionKernel<CacheFormat::kInt8>> int8({"GatedAttention", "ffffffffccl", "fcc"});
  static const Operator<GatedAttentionKernel<CacheFormat::kFp8>> fp8({"GatedAttention", "ffffffff88l", "f88"});
  for (const OrtCustomOp* op : {static_cast<const OrtCustomOp*>(&fp32), static_cast<const OrtCustomOp*>(&fp16),
                                static_cast<const OrtCustomOp*>(&int8), static_cast<const OrtCustomOp*>(&fp8)})
    domain.add(*op);
}

}  // namespace qwen
