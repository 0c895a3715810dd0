// Pieces of weights on their way to one warp: a ring in shared memory that is full before the first is used.
#pragma once

#include "panels.cuh"

namespace qwen {

// Of `count` pieces of at most `bytes` each. fetch(i, into) starts copying piece i; it is called in their order.
// No more than IN_FLIGHT pieces are on their way before `start` begins the next one: what another kernel reads meanwhile waits behind them.
template <int STAGES, int IN_FLIGHT = STAGES>
struct WarpRing {
  uint8_t* const memory;
  const int bytes, count;
  int used = 0, at = 0;  // pieces, and where the next one is

  // What `fetch` reads must not depend on the kernel before.
  template <typename Fetch>
  __device__ void start(const Fetch& fetch) const {
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) {
      if (i < count) fetch(i, memory + i * bytes);
      end_copies();
      if constexpr (IN_FLIGHT < STAGES) await_copies<IN_FLIGHT - 1>();
    }
  }

  // use(from) with the next piece, whose place the first one that is not on its way gets.
  template <typename Fetch, typename Use>
  __device__ void next(const Fetch& fetch, const Use& use) {
    await_copies<STAGES - 1>();
    __syncwarp();
    use(memory + at * bytes);
    __syncwarp();
    if (used + STAGES < count) fetch(used + STAGES, memory + at * bytes);
    end_copies();
    used++;
    at = at + 1 == STAGES ? 0 : at + 1;
  }
};

}  // namespace qwen
