#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace qwen {

// Throws std::runtime_error, which the ops hand to ONNX Runtime as the status of the run.
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// What has to be done once for each device: attributes of a kernel hold for the device that was current when they were set.
class DeviceFlags {
 public:
  template <typename Action>
  void once(Action action) {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    const uint64_t bit = uint64_t(1) << (device % 64);
    if (done_.load(std::memory_order_acquire) & bit) return;
    action();
    done_.fetch_or(bit, std::memory_order_release);
  }

 private:
  std::atomic<uint64_t> done_{0};
};

}  // namespace qwen
