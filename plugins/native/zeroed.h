// Memory of the current device that is zero before any stream reads it.
#pragma once

#include "check.h"

namespace qwen {

// `count` values. The caller frees them with cudaFree. ONNX Runtime's streams do not wait for the default one, on which the zeros are written.
template <typename T>
T* zeroed(size_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, sizeof(T) * count), "cudaMalloc");
  check(cudaMemset(memory, 0, sizeof(T) * count), "cudaMemset");
  check(cudaStreamSynchronize(cudaStreamLegacy), "cudaStreamSynchronize");
  return static_cast<T*>(memory);
}

}  // namespace qwen
