// How the blocks of a chain may start. They wait for each other's words, so all must run at the same time.
//
// A cooperative launch starts all blocks together, but only when the kernel before it is complete. A plain one starts each block as soon as a
// multiprocessor has room: weights are on their way while the mixer before it still runs, 2 us less for a layer. That is safe for the chains of one
// stream: a kernel of a stream starts only when all blocks of the kernels before it have, and whatever else holds a multiprocessor ends without them, so
// room comes for all blocks. Chains of two streams do not mix: of two plain ones each could hold a part of the device and wait for the rest for ever, and a
// cooperative one that waits for all of it keeps back the blocks that a plain one still needs. So one stream of a device, the first that has a chain,
// launches plainly, and while it has any other streams have none: their products run one by one. Where processes share
// multiprocessors all are cooperative.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "check.h"

namespace qwen {

enum class ChainStart {
  kEach,      // block by block
  kTogether,  // cooperative
  kNever,     // not at all: another stream has chains
};

class ChainStreams {
 public:
  static ChainStreams& of_process() {
    static ChainStreams streams;
    return streams;
  }

  // The device is the current one. `joined`: whether this chain counts as one of the first stream, of which `leave` is then called once.
  ChainStart start(int device, cudaStream_t stream, bool& joined) {
    if (shares_processors(device)) return ChainStart::kTogether;
    if (stream == cudaStreamPerThread) return ChainStart::kNever;  // the handle is another stream in each thread
    std::lock_guard<std::mutex> lock(mutex_);
    First& first = first_[device];
    if (!joined && (first.chains == 0 || first.stream == stream)) first.stream = stream, first.chains++, joined = true;
    return joined && first.stream == stream ? ChainStart::kEach : ChainStart::kNever;
  }

  void leave(int device) {
    std::lock_guard<std::mutex> lock(mutex_);
    first_[device].chains--;
  }

 private:
  struct First {
    cudaStream_t stream = nullptr;
    int chains = 0;
  };

  // With other processes, whose kernels may wait for a whole device, too.
  static bool shares_processors(int device) {
    int shared = 0;
    check(cudaDeviceGetAttribute(&shared, cudaDevAttrMpsEnabled, device), "cudaDeviceGetAttribute");
    return shared != 0;
  }

  std::mutex mutex_;
  std::map<int, First> first_;
};

}  // namespace qwen
