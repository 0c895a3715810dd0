// Chains (plugins/native/chain.h) beside the same ops one by one: the time of a layer, and how far the results are apart. Layers of DeltaNet in the
// shapes of the releases with random weights, three to a chain, both sides recorded as CUDA graphs. build.sh compiles it.
//
//   bench [LAYERS [SIZE [FORMAT [ROWS]]]]    so many layers at most, of 4B, int4, with 1 row alone, ...: for compute-sanitizer
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "chain.h"
#include "check.h"
#include "skinny.cuh"

using namespace qwen;
using T = __half;

namespace {

constexpr int kHead = 128, kMostRows = 4, kPending = 8, kLayersOfChain = 3, kReplays = 20;
constexpr float kEps = 1e-6f;

__device__ uint32_t mixed(uint32_t i, uint32_t seed) {
  uint32_t h = i * 2654435761u ^ seed;
  h ^= h >> 16, h *= 0x85ebca6bu, h ^= h >> 13, h *= 0xc2b2ae35u;
  return h ^ h >> 16;
}

template <typename E>
__global__ void fill(E* p, size_t n, float deviation, float mean, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x)
    p[i] = E((float(mixed(uint32_t(i), seed) & 0xffff) / 32768.0f - 1.0f) * deviation * 1.732f + mean);
}

// Groups of 4 blocks of 32: 64 scales in fp16, then codes.
__global__ void fill_int4(uint8_t* p, size_t n, float deviation, uint32_t seed) {
  constexpr int kScales = 128, kGroup = kScales + 1024;
  const __half scale = __float2half(deviation / 4.61f);
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x)
    p[i] = i % kGroup < kScales ? reinterpret_cast<const uint8_t*>(&scale)[i % 2] : uint8_t(mixed(uint32_t(i), seed));
}

// Device memory of one case.
class Memory {
 public:
  ~Memory() {
    for (void* p : all_) cudaFree(p);
  }
  template <typename E>
  E* zeros(size_t n) {
    void* p = nullptr;
    check(cudaMalloc(&p, n * sizeof(E)), "cudaMalloc");
    check(cudaMemset(p, 0, n * sizeof(E)), "cudaMemset");
    all_.push_back(p);
    return static_cast<E*>(p);
  }
  template <typename E>
  E* random(size_t n, float deviation, float mean = 0.0f) {
    E* p = zeros<E>(n);
    fill<E><<<512, 256>>>(p, n, deviation, mean, ++seed_);
    return p;
  }
  uint8_t* random_int4(size_t n, float deviation) {
    uint8_t* p = zeros<uint8_t>(n);
    fill_int4<<<1024, 256>>>(p, n, deviation, ++seed_);
    return p;
  }

 private:
  std::vector<void*> all_;
  uint32_t seed_ = 0;
};

struct Size {
  const char* name;
  int H, Hk, Hv, I, layers;
  int v() const { return Hv * kHead; }
  int channels() const { return (2 * Hk + Hv) * kHead; }
  int packed() const { return channels() + v(); }
  int gates() const { return 2 * Hv; }
  int width() const { return packed() + gates(); }
};

struct Matrix {
  bool int4;
  int N, K;
  QuantMatrix codes;
  T* plain = nullptr;
};

Matrix matrix(Memory& memory, bool int4, int N, int K) {
  Matrix w{int4, N, K, {}, nullptr};
  const float deviation = 1.0f / std::sqrt(float(K));
  if (int4) {
    w.codes.bits = 4, w.codes.block = 32, w.codes.N = N, w.codes.K = K;
    w.codes.packed = memory.random_int4(w.codes.bytes(), deviation);
  } else {
    w.plain = memory.random<T>(size_t(N) * K, deviation);
  }
  return w;
}

void linear(const Matrix& w, const T* x, const T* tail, int tail_rows, const T* residual, const T* norm, T* y, int M, cudaStream_t stream) {
  w.int4 ? quant_linear<T>(w.codes, x, tail, tail_rows, residual, norm, kEps, y, M, stream)
         : skinny_linear<T>(x, w.plain, residual, norm, kEps, y, M, w.N, w.K, stream);
}

void swiglu(const Matrix& w, const T* x, const T* norm, T* y, int M, cudaStream_t stream) {
  w.int4 ? quant_swiglu<T>(w.codes, x, norm, kEps, y, M, stream) : skinny_swiglu<T>(x, w.plain, norm, kEps, y, M, w.N / 2, w.K, stream);
}

// What a layer computes with; the two sides have results and states of their own.
struct Layer {
  Matrix out, gate_up, down, in;
  T *tail, *norm_up, *norm_in, *conv, *norm_head, *pending;
  float *a_log, *dt_bias;
  int* arrivals;
  struct Side {
    T *a, *h, *c, *packed, *y, *history;
    float* state;
  } sides[2];
};

Layer layer(Memory& memory, const Size& s, bool int4) {
  const int gates = int4 ? s.gates() : 0;  // of int4 the gates' rows are a tail
  Layer l;
  l.out = matrix(memory, int4, s.H, s.v()), l.gate_up = matrix(memory, int4, 2 * s.I, s.H), l.down = matrix(memory, int4, s.H, s.I);
  l.in = matrix(memory, int4, s.width() - gates, s.H);
  l.tail = memory.random<T>(size_t(s.gates()) * s.H, 1.0f / std::sqrt(float(s.H)));
  l.norm_up = memory.random<T>(s.H, 0.3f, 1.0f), l.norm_in = memory.random<T>(s.H, 0.3f, 1.0f), l.norm_head = memory.random<T>(kHead, 0.3f, 1.0f);
  l.conv = memory.random<T>(size_t(s.channels()) * kTaps, 0.5f), l.pending = memory.random<T>(size_t(kMostRows) * kPending * s.width(), 1.0f);
  l.a_log = memory.random<float>(s.Hv, 1.0f), l.dt_bias = memory.random<float>(s.Hv, 1.0f), l.arrivals = memory.zeros<int>(kMostRows * s.Hk);
  for (auto& side : l.sides) {
    side = {memory.zeros<T>(kMostRows * s.H), memory.zeros<T>(kMostRows * s.I), memory.zeros<T>(kMostRows * s.H), memory.zeros<T>(kMostRows * s.width()),
            memory.zeros<T>(kMostRows * s.v()), memory.zeros<T>(size_t(kMostRows) * (kTaps - 1) * s.channels()),
            memory.zeros<float>(size_t(kMostRows) * s.v() * kHead)};
  }
  return l;
}

// One for all, as a decoder has it: only the first stream with chains launches them plainly (chain_streams.h).
cudaStream_t the_stream() {
  static const cudaStream_t stream = [] {
    cudaStream_t made;
    check(cudaStreamCreate(&made), "cudaStreamCreate");
    return made;
  }();
  return stream;
}

// Microseconds of the fastest replay; < 0 where `body` does nothing.
float time_of(const std::function<bool(cudaStream_t)>& body) {
  const cudaStream_t stream = the_stream();
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaEvent_t begin, end;
  if (!body(stream)) return -1.0f;
  check(cudaStreamSynchronize(stream), "the first call");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  body(stream);
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  cudaEventCreate(&begin), cudaEventCreate(&end);
  float best = 1e9f;
  for (int i = 0; i < kReplays; i++) {
    cudaEventRecord(begin, stream);
    check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    cudaEventRecord(end, stream);
    check(cudaStreamSynchronize(stream), "a replay");
    float ms = 0.0f;
    cudaEventElapsedTime(&ms, begin, end);
    best = std::min(best, ms);
  }
  cudaGraphExecDestroy(executable), cudaGraphDestroy(graph);
  return best * 1000.0f;
}

template <typename E>
double apart(const E* expected, const E* got, size_t n) {
  std::vector<E> a(n), b(n);
  cudaMemcpy(a.data(), expected, n * sizeof(E), cudaMemcpyDeviceToHost), cudaMemcpy(b.data(), got, n * sizeof(E), cudaMemcpyDeviceToHost);
  double difference = 0.0, size = 0.0;
  for (size_t i = 0; i < n; i++) difference += std::pow(float(a[i]) - float(b[i]), 2), size += std::pow(float(a[i]), 2);
  return std::sqrt(difference / (size + 1e-30));
}

class Case {
 public:
  Case(const Size& size, bool int4) : s_(size), int4_(int4) {
    for (int i = 0; i < s_.layers; i++) layers_.push_back(layer(memory_, s_, int4));
    x_ = memory_.random<T>(kMostRows * s_.v(), 1.0f), residual_ = memory_.random<T>(kMostRows * s_.H, 1.0f);
    counts_ = memory_.zeros<int64_t>(2 * kMostRows);
    chains_ = std::vector<ChainMemory>((s_.layers + kLayersOfChain - 1) / kLayersOfChain);
  }

  // B sequences of M / B tokens, behind P pending ones.
  void run(int M, int B, int P) {
    const DeltaNetShape shape{B, M / B, s_.Hk, s_.Hv, P, kHead};
    int64_t counts[2 * kMostRows];
    for (int b = 0; b < kMostRows; b++) counts[b] = (3 * b + 2) % (P + 1), counts[kMostRows + b] = b % 2 ? shape.T : shape.T / 2;
    cudaMemcpy(counts_, counts, sizeof(counts), cudaMemcpyHostToDevice);
    for (const Layer& l : layers_) {
      for (const Layer::Side& side : l.sides) {
        cudaMemset(side.history, 0, sizeof(T) * kMostRows * (kTaps - 1) * s_.channels());
        cudaMemset(side.state, 0, sizeof(float) * kMostRows * s_.v() * kHead);
      }
    }
    const float single = time_of([&](cudaStream_t stream) { return one_by_one(shape, stream); });
    const float chained = time_of([&](cudaStream_t stream) { return in_chains(shape, stream); });
    std::printf("%-5s %s rows %d sequences %d pending %d: one by one %6.2f us a layer, ", s_.name, int4_ ? "int4" : "fp16", M, B, P, single / s_.layers);
    if (chained < 0.0f) {
      std::printf("no chain\n");
      return;
    }
    std::printf("chain %6.2f, ratio %.2f; apart in the first and the last layer:", chained / s_.layers, single / chained);
    for (const Layer* l : {&layers_.front(), &layers_.back()}) {
      const auto &a = l->sides[0], &b = l->sides[1];
      std::printf(" residual %.4f packed %.4f y %.4f state %.4f history %.4f", apart(a.c, b.c, M * s_.H), apart(a.packed, b.packed, M * s_.width()),
                  apart(a.y, b.y, M * s_.v()), apart(a.state, b.state, size_t(B) * s_.v() * kHead), apart(a.history, b.history, size_t(B) * 3 * s_.channels()));
    }
    std::printf("\n");
  }

 private:
  DeltaNetTensors<T> tensors(const Layer& l, int side, int P) const {
    const Layer::Side& o = l.sides[side];
    return {o.packed, l.conv, l.a_log, l.dt_bias, l.norm_head, o.history, o.state, P ? l.pending : nullptr, P ? counts_ : nullptr,
            P ? counts_ + kMostRows : nullptr, o.y, o.history, o.state};
  }

  bool one_by_one(const DeltaNetShape& shape, cudaStream_t stream) const {
    const int M = shape.B * shape.T;
    const T *x = x_, *residual = residual_;
    for (const Layer& l : layers_) {
      const Layer::Side& o = l.sides[0];
      linear(l.out, x, nullptr, 0, residual, nullptr, o.a, M, stream);
      swiglu(l.gate_up, o.a, l.norm_up, o.h, M, stream);
      linear(l.down, o.h, nullptr, 0, o.a, nullptr, o.c, M, stream);
      linear(l.in, o.c, int4_ ? l.tail : nullptr, int4_ ? s_.gates() : 0, nullptr, l.norm_in, o.packed, M, stream);
      delta_net<T>(shape, tensors(l, 0, shape.P), kEps, nullptr, l.arrivals, kMostRows * s_.Hk, stream);
      x = o.y, residual = o.c;
    }
    return true;
  }

  ChainPart<T> product(const Matrix& w, ChainKind kind, const T* x, int x_from, T* y) const {
    ChainPart<T> part;
    part.kind = kind, part.format = int4_ ? ChainFormat::kQuant : ChainFormat::kPlain;
    part.plain = w.plain, part.quant = w.codes, part.N = kind == ChainKind::kSwiGlu ? w.N / 2 : w.N, part.K = w.K;
    part.x = x, part.x_from = x_from, part.y = y, part.eps = kEps;
    return part;
  }

  bool in_chains(const DeltaNetShape& shape, cudaStream_t stream) {
    const T *x = x_, *residual = residual_;
    for (size_t first = 0, chain = 0; first < layers_.size(); first += kLayersOfChain, chain++) {
      std::vector<ChainPart<T>> parts;
      for (size_t i = first; i < std::min(first + kLayersOfChain, layers_.size()); i++) {
        const Layer& l = layers_[i];
        const Layer::Side& o = l.sides[1];
        const int n = int(parts.size()), last = i > first ? n - 1 : -1;
        parts.push_back(product(l.out, ChainKind::kLinear, x, last, o.a));
        parts.back().residual = residual, parts.back().residual_from = i > first ? n - 3 : -1;
        parts.push_back(product(l.gate_up, ChainKind::kSwiGlu, o.a, n, o.h));
        parts.back().norm = l.norm_up, parts.back().leaves = false;
        parts.push_back(product(l.down, ChainKind::kLinear, o.h, n + 1, o.c));
        parts.back().residual = o.a, parts.back().residual_from = n;
        parts.push_back(product(l.in, ChainKind::kLinear, o.c, n + 2, o.packed));
        parts.back().norm = l.norm_in;
        if (int4_) parts.back().tail = l.tail, parts.back().tail_rows = s_.gates();
        ChainPart<T> mixer;
        mixer.kind = ChainKind::kDeltaNet, mixer.shape = shape, mixer.in = tensors(l, 1, shape.P), mixer.eps = kEps;
        mixer.arrivals = l.arrivals, mixer.arrivals_size = kMostRows * s_.Hk, mixer.x_from = n + 3;
        parts.push_back(mixer);
        x = o.y, residual = o.c;
      }
      if (!run_chain<T>(parts, shape.B * shape.T, chains_[chain], stream)) return false;
    }
    return true;
  }

  Size s_;
  bool int4_;
  Memory memory_;
  std::vector<Layer> layers_;
  T *x_, *residual_;
  int64_t* counts_;
  std::vector<ChainMemory> chains_;
};

}  // namespace

int main(int argc, char** argv) {
  const int most = argc > 1 ? std::atoi(argv[1]) : 1000;
  const auto wanted = [&](int argument, const char* name) { return argc <= argument || std::strcmp(argv[argument], name) == 0; };
  const Size sizes[] = {{"0.8B", 1024, 16, 16, 3584, 18}, {"4B", 2560, 16, 32, 9216, 24}, {"9B", 4096, 16, 32, 12288, 9}};
  for (Size size : sizes) {
    size.layers = std::min(size.layers, most);
    for (const bool int4 : {false, true}) {
      if (!wanted(2, size.name) || !wanted(3, int4 ? "int4" : "fp16")) continue;
      Case one(size, int4);
      for (int M = 1; M <= kMostRows; M++) {
        if (!wanted(4, std::to_string(M).c_str())) continue;
        one.run(M, 1, 0), one.run(M, 1, 4);
        if (M > 1) one.run(M, M, 4);
      }
    }
  }
  check(cudaDeviceSynchronize(), "the last call");
}
