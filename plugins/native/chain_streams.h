// How the blocks of a chain may start. They wait for each other's words, so all must run at the same time.
//
// A cooperative launch starts all blocks together, but only when the kernel before it is complete. A plain one starts each block as soon as a
// multiprocessor has room: weights are on their way while the mixer before it still runs, 2 us less for a layer. That is safe for the chains of one
// stream: a kernel of a stream starts only when all blocks of the kernels before it have, and whatever else holds a multiprocessor ends without them, so
// room comes for all blocks. Two chains on two streams could each hold a part of the device and wait for the rest for ever. So one stream of a device, the
// first that has a chain, launches plainly while it has any; chains of other streams are cooperative: they take nothing before they can take all they need.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "check.h"

namespace qwen {

enum class ChainStart {
  kEach,      // block by block
  kTogether,  // cooperative
  kNever,     // not at all: the device would give what others hold a part of to this stream first
};

class ChainStreams {
 public:
  static ChainStreams& of_process() {
    static ChainStreams streams;
    return streams;
  }

  // The device is the current one. `joined`: whether this chain counts as one of the first stream, of which `leave` is then called once.
  ChainStart start(int device, cudaStream_t stream, bool& joined) {
    std::lock_guard<std::mutex> lock(mutex_);
    First& first = first_[device];
    if (!joined && (first.chains == 0 || first.stream == stream) && may_be_first(device, stream)) {
      if (first.chains == 0) first.stream = stream, first.priority = priority(stream);
      first.chains++, joined = true;
    }
    if (joined && first.stream == stream) return ChainStart::kEach;
    return first.chains && priority(stream) < first.priority ? ChainStart::kNever : ChainStart::kTogether;
  }

  void leave(int device) {
    std::lock_guard<std::mutex> lock(mutex_);
    first_[device].chains--;
  }

 private:
  struct First {
    cudaStream_t stream = nullptr;
    int chains = 0, priority = 0;
  };

  static int priority(cudaStream_t stream) {
    int value = 0;
    check(cudaStreamGetPriority(stream, &value), "cudaStreamGetPriority");
    return value;
  }

  // Not where processes share multiprocessors, nor the handle that is another stream in each thread.
  static bool may_be_first(int device, cudaStream_t stream) {
    int shared = 0;
    check(cudaDeviceGetAttribute(&shared, cudaDevAttrMpsEnabled, device), "cudaDeviceGetAttribute");
    return !shared && stream != cudaStreamPerThread;
  }

  std::mutex mutex_;
  std::map<int, First> first_;
};

}  // namespace qwen
