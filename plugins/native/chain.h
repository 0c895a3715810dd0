// Chains of the ops of decoder layers for a few rows: the products between two mixers in one launch (chain.cu, chain_kernel.cuh).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "chain_streams.h"
#include "delta_net.cuh"
#include "quant.cuh"

namespace qwen {

enum class ChainKind { kLinear, kSwiGlu, kDeltaNet };
enum class ChainFormat { kPlain, kQuant, kOther };  // other matrices are multiplied one op after the other

// One op of a chain. Addresses are of device memory.
template <typename T>
struct ChainPart {
  ChainKind kind = ChainKind::kLinear;
  ChainFormat format = ChainFormat::kOther;
  const T* plain = nullptr;  // kPlain: w [N,K], of SwiGlu [2N,K]
  QuantMatrix quant;         // kQuant
  int N = 0, K = 0;          // columns of y that come from w, columns of x
  const T *x = nullptr, *tail = nullptr, *residual = nullptr, *norm = nullptr;  // as in quant_linear
  int tail_rows = 0;
  float eps = 0.0f;
  T* y = nullptr;          // [M, N + tail_rows]
  bool leaves = true;      // false: only parts of this chain read y
  int x_from = -1;         // the part whose y is x, of DeltaNet in.packed; -1: none of this chain
  int residual_from = -1;  // the same of the residual
  DeltaNetShape shape{};   // kDeltaNet, with in.y as its result
  DeltaNetTensors<T> in{};
  int *arrivals = nullptr, arrivals_size = 0;  // as of delta_net
};

constexpr int kMostChainRows = 4;

// What a chain keeps between calls, on the device of its first call. Plans for different numbers of rows lie differently: each number has its own.
class ChainMemory {
 public:
  ChainMemory() = default;
  ~ChainMemory();
  ChainMemory(const ChainMemory&) = delete;
  ChainMemory& operator=(const ChainMemory&) = delete;

  // At least `bytes` for M rows, all bits set at first. Null while `stream` is recorded and there is no memory yet.
  uint8_t* get(int M, size_t bytes, cudaStream_t stream);
  ChainStart start(cudaStream_t stream);

 private:
  int device_ = 0;
  bool joined_ = false;  // counts as a chain of the device's first stream
  void* memory_[kMostChainRows]{};
  size_t bytes_[kMostChainRows]{};
};

// All parts for M rows, in a launch for each run of products. False: the device, the formats or the sizes are not for it, or it would be slower;
// then nothing was done.
// Throws std::runtime_error where a launch fails.
template <typename T>
bool run_chain(const std::vector<ChainPart<T>>& parts, int M, ChainMemory& memory, cudaStream_t stream);

}  // namespace qwen
