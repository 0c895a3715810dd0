// Pieces of weights on their way to one warp: a ring in shared memory that is full before the first is used.
#pragma once

#include "panels.cuh"

namespace qwen {

// fetch(i, into) starts copying piece i of `count`, of at most `bytes`; use(i, from) has it.
template <int STAGES>
struct WarpRing {
  uint8_t* const memory;
  const int bytes, count;

  // Before run; what `fetch` reads need not depend on the kernel before.
  template <typename Fetch>
  __device__ void start(const Fetch& fetch) const {
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) {
      if (i < count) fetch(i, memory + i * bytes);
      end_copies();
    }
  }

  template <typename Fetch, typename Use>
  __device__ void run(const Fetch& fetch, const Use& use) const {
    int at = 0;
#pragma unroll 1
    for (int i = 0; i < count; i++) {
      await_copies<STAGES - 1>();
      __syncwarp();
      use(i, memory + at * bytes);
      __syncwarp();
      if (i + STAGES < count) fetch(i + STAGES, memory + at * bytes);
      end_copies();
      at = at + 1 == STAGES ? 0 : at + 1;
    }
    await_copies<0>();
  }
};

}  // namespace qwen
