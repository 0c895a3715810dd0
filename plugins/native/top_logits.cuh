// The largest entries of rows of logits.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace qwen {

// values, ids [rows,K]: the K largest of logits [rows,V], larger first, of equal ones the lower id first; NaN counts as largest.
// K at most 64 and at most V. `scratch` has top_logits_scratch(rows, V) bytes.
// Logits of 16 bits are also written to `wide` [rows,V], in the one reading of all of them; where T is float it is not used.
template <typename T>
void top_logits(const T* logits, float* wide, float* values, int32_t* ids, int rows, int V, int K, void* scratch, cudaStream_t stream);
size_t top_logits_scratch(int rows, int V);

}  // namespace qwen
