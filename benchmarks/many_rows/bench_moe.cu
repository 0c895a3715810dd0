#include <cstdio>
#include "moe_many.cuh"
#include "quant_stream.cuh"
using namespace qwen;
extern "C" {
static QuantMatrix matrix(const void* packed, int bits, int block, int N, int K) { QuantMatrix w; w.packed = (const uint8_t*)packed; w.bits = bits; w.block = block; w.N = N; w.K = K; return w; }
static Experts<QuantMatrix> experts(const void* up, const void* down, int bits, int block, int tokens, int H, int I, int E, int K) {
  return {matrix(up, bits, block, 2 * I, H), matrix(down, bits, block, H, I), tokens, H, I, E, K};
}
long moe_space(int tokens, int H, int I, int E, int K) {
  auto moe = experts(nullptr, nullptr, 4, 32, tokens, H, I, E, K);
  auto work = work_of<__half>(moe); ManyWork<__half> many;
  return place(work, nullptr) + place_many(many, moe, nullptr);
}
int moe_run(int many, const void* up, const void* back, int bits, int block, int tokens, int H, int I, int E, int K, const void* x, const void* logits, void* y, void* space, void* stream) {
  try {
    auto moe = experts(up, back, bits, block, tokens, H, I, E, K);
    auto s = (cudaStream_t)stream;
    if (many) { run_moe_many<__half>(moe, (const __half*)x, (const __half*)logits, (__half*)y, space, s); return 0; }
    const auto work = routed(moe, (const __half*)x, (const __half*)logits, (__half*)y, space, s);
    gate_up<__half, Int4Stream>(work, s); down<__half, Int4Stream>(work, s); combine(work, s);
    return 0;
  } catch (const std::exception& e) { printf("%s\n", e.what()); return 1; }
}
}
