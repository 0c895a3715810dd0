// A Gated DeltaNet mixer between its input and output projections: causal conv + SiLU, L2 norm, gates, recurrence, gated RMS norm.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace qwen {

constexpr int kTaps = 4;       // taps of the convolution
constexpr int kFewTokens = 9;  // up to here one kernel does everything: a verify of a draft of 8

struct DeltaNetShape {
  int B, T, Hk, Hv, P, D;  // P: rows of `pending`, D: Dk and Dv
  __host__ __device__ int channels() const { return (2 * Hk + Hv) * D; }  // of the convolution: q | k | v
  __host__ __device__ int width() const { return channels() + Hv * D + 2 * Hv; }
};

constexpr bool takes_head(int64_t D) { return D == 64 || D == 128; }

// packed [B,T,C+Hv*D+2Hv] = qkv | z | a | b   conv [C,4]  a_log, dt_bias f32[Hv]  norm [D]
// history [B,3,C] and state f32[B,Hv,D,D] (V-major: Dv, Dk); each may be the same memory as its successor
// pending [B,P,width], accepted [B] in 0..P, commit [B] in 0..T: the transaction of graphs/ops/gated_delta_net_op.py. `pending` is the packed
// projection of an earlier call; rows from `accepted` on are not read. `accepted` and `commit` are both null without a transaction: then
// nothing is pending and all tokens are committed. All three belong to earlier work in the stream than the kernel before this call.
// y [B,T,Hv*D]; unspecified at t >= commit > 0
template <typename T>
struct DeltaNetTensors {
  const T *packed, *conv;
  const float *a_log, *dt_bias;
  const T *norm, *history;
  const float* state;
  const T* pending;
  const int64_t *accepted, *commit;
  T *y, *history_out;
  float* state_out;
};

// Bytes of workspace that a call needs, 0 for few tokens.
size_t delta_net_workspace(const DeltaNetShape& shape);

// `arrivals` are `arrivals_size` zeros on the device that belong to the caller's node; they are zeros again after the call.
template <typename T>
void delta_net(const DeltaNetShape& shape, const DeltaNetTensors<T>& tensors, float eps, void* workspace, int* arrivals, int arrivals_size,
               cudaStream_t stream);

}  // namespace qwen
