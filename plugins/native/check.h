#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace qwen {

// Throws std::runtime_error, which the ops hand to ONNX Runtime as the status of the run.
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace qwen
