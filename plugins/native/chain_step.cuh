// What a launch of a chain is made of, as the host plans it and the kernel reads it.
#pragma once

#include <cstdint>

#include "chain.h"
#include "panel_rows.cuh"

namespace qwen {

constexpr int kChainWarps = 16, kChainThreads = kChainWarps * 32;  // that multiply; one more warp fetches
constexpr int kMostChainStages = 6, kMostChainSteps = 8;
constexpr int kMostParts = 4;
constexpr int kInFlight = 2;  // stages on their way at most: small reads of the same block wait behind them

// Panels whose sums meet at once: as many as most blocks have of a step.
__host__ __device__ constexpr int log_together(int log_rows) { return log_rows <= 1 ? 4 : 3; }

enum class Arrival : int {
  kMemory,  // T [M,stride], complete before the launch
  kWords,   // words of two T, [M,stride / 2]
  kParts,   // the same, [parts][M,K / 2]: to be added to the residual
};

// n / d, where the quotient is below 2^20: a division of integers takes a block that starts late a while.
__host__ __device__ inline int divided(int n, int d) {
#ifdef __CUDA_ARCH__
  const int near = int(__fdividef(float(n), float(d))), rest = n - near * d;
  return near + (rest >= d) - (rest < 0);
#else
  return n / d;
#endif
}

// Which block has which units of a product. The units of all panels lie in a row, and a block takes an interval of them.
struct Spread {
  int first_block, blocks, panels, units, whole;  // whole: panels that must stay together, 1 or 2; 0: a share may begin at any unit

  __host__ __device__ int total() const { return panels * units; }
  __host__ __device__ int begin(int share) const { return whole ? divided(panels / whole * share, blocks) * whole * units : divided(total() * share, blocks); }
  // The share that has unit `index`, where shares begin anywhere.
  __host__ __device__ int share_of(int index) const { return divided((index + 1) * blocks - 1, total()); }
  __host__ __device__ int first_share(int panel) const { return share_of(panel * units); }
  __host__ __device__ int parts(int panel) const { return share_of((panel + 1) * units - 1) - first_share(panel) + 1; }
};

// A product, or the tail of one, whose input is that of the step before.
template <typename Panels>
struct ChainStep {
  using T = typename Panels::Element;
  typename Panels::Matrix w;
  const T* tail;
  const void* x;
  const T* residual;           // kParts: [M,K]; null: the one that every block keeps
  T* residual_out;             // kParts: where the sum goes, too, or null
  const T* norm;               // kParts
  uint32_t* out;               // words of two columns [M,columns / 2], of a divided product [parts][M,columns / 2]; null: nobody waits for it
  T* y;                        // [M,columns] or null
  Spread spread, producer;     // producer: of the product whose parts are the input; no blocks: the residual alone is the input
  Arrival arrival;
  int norm_at;                 // where the norm is in shared memory, in elements
  int K, x_stride, first_column, columns;
  int up_rows;                 // SwiGlu: rows of w before those of up
  float eps;
};

template <typename Panels>
struct ChainProgram {
  int count, M, stages, norms;  // norms: elements of all their weights
  int bars_at, sums_at, rows_at, zeros_at, residual_at, squares_at, norms_at;  // in shared memory
  uint32_t* calls;  // a number per block: the calls so far, less one
  uint32_t* words;  // two buffers
  int buffer;       // words of one
  ChainStep<Panels> steps[kMostChainSteps];
};

}  // namespace qwen
