#include <cstdio>
#include "product_many.cuh"
using namespace qwen;
struct Variant { const char* name; int bits, general, columns, sharing; void (*linear)(const ManyProduct&, cudaStream_t); void (*swiglu)(const ManyProduct&, cudaStream_t); };
#define V(BITS, G, COLUMNS, SHARING) {"int" #BITS " general " #G " cols " #COLUMNS " sharing " #SHARING, BITS, G, COLUMNS, SHARING, \
  run_many<__half, BITS, G, COLUMNS, SHARING, false, false>, run_many<__half, BITS, G, COLUMNS, SHARING, true, false>}
static const Variant variants[] = {
  V(4,0,16,1), V(4,0,32,1), V(4,0,64,1), V(4,0,128,1),
#ifndef QUICK
  V(4,0,16,2), V(4,0,32,2), V(4,0,32,4), V(4,0,64,2), V(4,0,64,4), V(4,0,128,2), V(4,0,128,4), V(8,0,64,1), V(8,0,64,2), V(8,0,128,1), V(8,0,128,2), V(4,1,64,1),
#endif
};
extern "C" {
int many_variants() { return sizeof(variants) / sizeof(variants[0]); }
const char* many_name(int i) { return variants[i].name; }
int many_columns(int i) { return variants[i].columns; }
int many_sharing(int i) { return variants[i].sharing; }
int many_bits(int i) { return variants[i].bits; }
static QuantMatrix matrix(const void* packed, int bits, int block, int N, int K) { QuantMatrix w; w.packed = (const uint8_t*)packed; w.bits = bits; w.block = block; w.N = N; w.K = K; return w; }
long many_bytes(int bits, int block, int N, int K) { return matrix(nullptr, bits, block, N, K).bytes(); }
int many_run(int variant, int swiglu, const void* packed, int bits, int block, int N, int K, const void* x, const void* residual, void* y, int M, int splits, void* stream) {
  try {
    ManyProduct p{}; p.w = matrix(packed, bits, block, N, K); p.x = x; p.residual = residual; p.y = y; p.M = M; p.N = swiglu ? N / 2 : N; p.stride = p.N; p.splits = splits;
    (swiglu ? variants[variant].swiglu : variants[variant].linear)(p, (cudaStream_t)stream);
    return 0;
  } catch (const std::exception& e) { printf("%s: %s\n", variants[variant].name, e.what()); return 1; }
}
int many_arrange(int bits, const void* x, const void* norm, void* y, int M, int K, int columns, void* stream) {
  arrange<__half>(bits, (const __half*)x, (const __half*)norm, 1e-6f, (__half*)y, nullptr, M, K, columns, (cudaStream_t)stream);
  return 0;
}
int many_dequantize(const void* packed, int bits, int block, int N, int K, void* out, void* stream) {
  dequantize<__half>(matrix(packed, bits, block, N, K), 0, N, (__half*)out, (cudaStream_t)stream); return 0;
}
}
