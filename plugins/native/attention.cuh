// Gated attention over a cache, between the projections of an attention layer (graphs/ops/gated_attention_op.py): head norms, rotation, cache
// write, causal attention of grouped heads, output gate.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace qwen {

struct AttentionShape {
  int B, T, Hq, Hkv, S, D;
  int R;                                 // dimensions that turn
  int room;                              // slots for which there is a place in the caches and a row of cos and sin
  int q_stride, kv_stride, gate_stride;  // elements from one token to the next
  int64_t table_stride;                  // elements from one sequence's cos and sin to the next; 0 where they share a table
  __host__ __device__ int group() const { return Hq / Hkv; }
};

constexpr bool takes_attention_head(int64_t D) { return D == 32 || D == 64 || D == 128 || D == 256; }
// Where caches keep bytes.
constexpr bool takes_attention_head_of_bytes(int64_t D) { return D == 64 || D == 256; }

// What caches keep of a row (attention_cache.cuh): bytes of an element, and elements of a row behind its D values.
struct PlainRow {
  static constexpr bool kPlain = true;
  static constexpr int kElement = 2, kBehind = 0;
};
struct Int8Row {
  static constexpr bool kPlain = false;
  static constexpr int kElement = 1, kBehind = 16;
};
struct Fp8Row {
  static constexpr bool kPlain = false;
  static constexpr int kElement = 1, kBehind = 0;
};
struct PlainCache;
struct Int8Cache;
struct Fp8Cache;

// q, gate [B,T,Hq*D] and k, v [B,T,Hkv*D] with strides; norms [D]; cos, sin [S',R/2] or [B,S',R/2]; caches [B,Hkv,S] rows, written in place;
// length [B]: tokens before. y [B,T,Hq*D]. Slots at and behind length + T of a sequence are not touched.
template <typename T>
struct AttentionTensors {
  const T *q, *k, *v, *gate, *q_norm, *k_norm, *cos, *sin;
  unsigned char *k_cache, *v_cache;
  const int64_t* length;
  T* y;
};

// Tokens before, of sequence b. Out of range it must not become an address.
template <typename T>
__device__ inline int length_of(const AttentionShape& shape, const AttentionTensors<T>& in, int b) {
  const int64_t most = shape.room - shape.T, given = in.length[b];
  return int(given < 0 ? 0 : given > most ? most : given);
}

// What the device determines. `counters` are zero before a call and after it.
struct AttentionDevice {
  int major;  // of the compute capability
  int processors;
  int shared_bytes;  // of a block
  unsigned* counters;
};
constexpr int kAttentionCounters = 1 << 14;

// `workspace` has attention_workspace bytes. The results of a sequence depend on nothing of the others, nor on how many they are.
template <typename T, typename Cache>
void gated_attention(const AttentionShape& shape, const AttentionTensors<T>& tensors, float scale, float eps, const AttentionDevice& device,
                     void* workspace, cudaStream_t stream);
size_t attention_workspace(const AttentionShape& shape, const AttentionDevice& device);

}  // namespace qwen
