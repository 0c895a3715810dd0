// Memory that a thread keeps from call to call, aligned to 64 bytes: the allocator would return it to the system each time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace qwen {

class ThreadMemory {
 public:
  char* at_least(size_t bytes) {
    if (size_ < bytes + 64) {
      memory_.reset();
      memory_.reset(new char[size_ = bytes + 64]);
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (64 - address % 64) % 64;
  }

 private:
  std::unique_ptr<char[]> memory_;
  size_t size_ = 0;
};

}  // namespace qwen
