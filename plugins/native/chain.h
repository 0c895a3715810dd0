// Several ops of a decoder in one launch, where the calls have few rows.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "delta_net.cuh"
#include "quant.cuh"

namespace qwen {

enum class ChainKind { kLinear, kSwiGlu, kDeltaNet };
enum class ChainFormat { kPlain, kQuant, kOther };  // kOther (fp8): always one by one

// One op of a chain. Addresses are of device memory; every result has memory, whether it leaves the chain or not.
template <typename T>
struct ChainPart {
  ChainKind kind;
  ChainFormat format;
  const T* plain;     // kPlain: w [N,K] (SwiGlu [2N,K])
  QuantMatrix quant;  // kQuant
  int N, K;           // columns of y that come from w (SwiGlu: of y), columns of x
  const T *x, *tail, *residual, *norm;  // as in quant_linear; null where there is none
  int tail_rows;
  float eps;
  T* y;               // [M, N + tail_rows]
  int x_from;         // the part whose y is x, -1: none of this chain
  int residual_from;  // the same of the residual
  // kDeltaNet: x_from says which part made in.packed (y of that part)
  DeltaNetShape shape;
  DeltaNetTensors<T> in;
};

// What a node keeps between calls, on the device it runs on.
class ChainMemory {
 public:
  ChainMemory() = default;
  ChainMemory(const ChainMemory&) = delete;
  ChainMemory& operator=(const ChainMemory&) = delete;
};

// All parts for M <= 8 rows in one launch. False: this device, these formats or sizes are not for it, and nothing has been done.
template <typename T>
bool run_chain(const std::vector<ChainPart<T>>& parts, int M, ChainMemory& memory, cudaStream_t stream);

}  // namespace qwen
