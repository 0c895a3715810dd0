// A few tokens of a Gated DeltaNet mixer in one block per value head: the body of the kernels of delta_net.cu and of delta_net_step.cu.
#pragma once

#include <type_traits>

#include "delta_net.cuh"
#include "device.cuh"

namespace qwen {

constexpr float kL2Eps = 1e-6f;

__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(__expf(x)); }

__device__ inline float decay(float a, float a_log, float dt_bias) { return expf(-expf(a_log) * softplus(a + dt_bias)); }

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// A count that was written by the caller's caller: out of range it must not become an address.
__device__ inline int clamped(int64_t count, int most) { return int(min(max(count, int64_t(0)), int64_t(most))); }

// One lane's part of a row that a warp holds.
template <int D>
using LanePart = std::conditional_t<D == 128, float4, float2>;

__device__ inline float dot(float4 a, float4 b) { return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x))); }

__device__ inline float dot(float2 a, float2 b) { return fmaf(a.y, b.y, a.x * b.x); }

__device__ inline float4 scaled(float4 a, float s) { return make_float4(a.x * s, a.y * s, a.z * s, a.w * s); }

__device__ inline float2 scaled(float2 a, float s) { return make_float2(a.x * s, a.y * s); }

constexpr int kHeadThreads = 512;  // of a block, which is one value head
static_assert(kFewTokens <= kHeadThreads / 32, "a warp writes the outputs of one token");

// The convolution of one channel, as it moves over the rows.
template <typename T>
struct Channel {
  float taps[kTaps], past[kTaps - 1];

  __device__ float next(float x) {
    const float sum = fmaf(x, taps[3], fmaf(past[2], taps[2], fmaf(past[1], taps[1], past[0] * taps[0])));
    past[0] = past[1], past[1] = past[2], past[2] = x;
    return silu(sum);
  }
};

// Norms of a row of q and one of k, by a warp; returns their product.
template <int D>
__device__ inline float normalize(float* q, float* k, int lane) {
  using Part = LanePart<D>;
  Part a = reinterpret_cast<Part*>(q)[lane], c = reinterpret_cast<Part*>(k)[lane];
  a = scaled(a, rsqrtf(warp_sum(dot(a, a)) + kL2Eps) * rsqrtf(float(D)));
  c = scaled(c, rsqrtf(warp_sum(dot(c, c)) + kL2Eps));
  const float both = warp_sum(dot(a, c));
  reinterpret_cast<Part*>(q)[lane] = a, reinterpret_cast<Part*>(k)[lane] = c;
  return both;
}

// A key head's part of the history is read by all its `ratio` value heads: the last of them to have read it writes it. Without counters the
// first does, which may then not write what it was read from. One thread counts its block, behind a barrier before which all of the block have
// used what they read; the answer comes late, and nothing waits for it before is_last_reader.
__device__ inline int count_reader(int* arrivals, int key_head, int ratio) {
  return arrivals == nullptr || ratio == 1 ? 0 : atomicAdd(arrivals + key_head, 1);
}

__device__ inline bool is_last_reader(int* arrivals, int key_head, int place, int ratio, int readers_before) {
  if (arrivals == nullptr) return place == 0;
  const bool last = readers_before == ratio - 1;
  if (last && ratio > 1) arrivals[key_head] = 0;
  return last;
}

// One token of some columns, each of them in LANES lanes: part p of a column holds k = 4 (LANES j + p) + 0..3. `out` has the outputs.
template <int LANES, int COLUMNS, int QUADS>
__device__ inline void read_token(float4 (&S)[COLUMNS][QUADS], const float* q, const float* k, const float (&v)[COLUMNS], float qk, float gate, float beta,
                                  int part, float (&out)[COLUMNS]) {
  float sk[COLUMNS] = {}, sq[COLUMNS] = {};
  float4 key[QUADS];
#pragma unroll
  for (int j = 0; j < QUADS; j++) {
    key[j] = reinterpret_cast<const float4*>(k)[j * LANES + part];
    const float4 query = reinterpret_cast<const float4*>(q)[j * LANES + part];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) sk[c] += dot(S[c][j], key[j]), sq[c] += dot(S[c][j], query);
  }
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) {
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      sk[c] += __shfl_xor_sync(0xffffffffu, sk[c], step);
      sq[c] += __shfl_xor_sync(0xffffffffu, sq[c], step);
    }
  }
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) {
    const float delta = beta * fmaf(-gate, sk[c], v[c]);
    out[c] = fmaf(qk, delta, gate * sq[c]);
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
      float4& s = S[c][j];
      s.x = fmaf(delta, key[j].x, gate * s.x), s.y = fmaf(delta, key[j].y, gate * s.y);
      s.z = fmaf(delta, key[j].z, gate * s.z), s.w = fmaf(delta, key[j].w, gate * s.w);
    }
  }
}

// With a transaction the accepted rows of `pending` go through the same loop as the new tokens, up to kFewTokens at a time and before the
// projection of the new ones is complete. So every token is read by the same instructions, whichever call it came with.
//
// `pending` rows are to be replayed, `commit` of the new tokens enter the state. Without `arrivals` the history and its successor must not be
// the same memory.
template <typename T, int D, bool TRANSACTION>
__device__ inline void few_tokens(DeltaNetShape shape, const DeltaNetTensors<T>& in, int pending, const int commit, float eps, int* arrivals) {
  constexpr int kGroups = kHeadThreads / D;
  constexpr int kLanes = kGroups;           // lanes per column
  constexpr int kQuads = D / (4 * kLanes);  // float4s of a column that a lane holds
  constexpr int kItems = D / 32;            // elements of a row that a lane holds, where a warp holds the row
  using Part = LanePart<D>;
  __shared__ __align__(16) float q[kFewTokens][D], k[kFewTokens][D], v[kFewTokens][D], o[kFewTokens][D];
  __shared__ float qk[kFewTokens], gate[kFewTokens], beta[kFewTokens];
  __shared__ bool last;

  const int hv = blockIdx.x, b = blockIdx.y, tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int Hk = shape.Hk, Hv = shape.Hv, tokens = shape.T, ratio = Hv / Hk, hk = hv / ratio;
  shape.D = D;  // now the compiler knows it
  const int C = shape.channels(), width = shape.width();
  const T* history = in.history + size_t(b) * (kTaps - 1) * C;
  T* history_out = in.history_out + size_t(b) * (kTaps - 1) * C;

  // The state was written by an earlier call, and the projection that feeds this one ran in between: it is complete. Lane p of a column holds
  // k = 4 (kLanes j + p) + 0..3.
  const int column = tid / kLanes, part = tid % kLanes;
  const size_t at = ((size_t(b) * Hv + hv) * D + column) * D + part * 4;
  float4 S[1][kQuads];
#pragma unroll
  for (int j = 0; j < kQuads; j++) S[0][j] = *reinterpret_cast<const float4*>(in.state + at + j * kLanes * 4);
  auto store_state = [&] {
#pragma unroll
    for (int j = 0; j < kQuads; j++) *reinterpret_cast<float4*>(in.state_out + at + j * kLanes * 4) = S[0][j];
  };
  // 3 D threads own a channel each; taps and history do not depend on the projection either.
  const int group = tid / D, within = tid % D;  // 0: q, 1: k, 2: v, 3: gates
  const int channel = group == 0 ? hk * D + within : group == 1 ? (Hk + hk) * D + within : (2 * Hk + hv) * D + within;
  T new_history[kTaps - 1];
  if (group < 3) {
#pragma unroll
    for (int i = 0; i < kTaps - 1; i++) new_history[i] = history[i * C + channel];
  }
  const float a_log = in.a_log[hv], dt_bias = in.dt_bias[hv];
  float norm[kItems], gating[kItems];  // warp t writes token t
  const bool counts = tid == kHeadThreads - 1;  // in a warp that has no row to normalize
  int readers_before = 0;
  const T* rows = TRANSACTION ? in.pending + size_t(b) * shape.P * width : nullptr;
  while (true) {
    const bool replay = TRANSACTION && pending > 0;
    const int count = replay ? min(pending, kFewTokens) : tokens;
    Channel<T> conv;  // loaded again for every pass: S needs the registers in between
    if (group < 3) {
#pragma unroll
      for (int i = 0; i < kTaps; i++) conv.taps[i] = to_float(in.conv[channel * kTaps + i]);
#pragma unroll
      for (int i = 0; i < kTaps - 1; i++) conv.past[i] = to_float(new_history[i]);
    }
    if (!replay) {
#pragma unroll
      for (int i = 0; i < kItems; i++) norm[i] = to_float(in.norm[lane * kItems + i]);
      wait_for_previous();
      let_next_start();
      rows = in.packed + size_t(b) * tokens * width;
      if (warp < tokens) {
#pragma unroll
        for (int i = 0; i < kItems; i++) gating[i] = to_float(rows[size_t(warp) * width + C + hv * D + lane * kItems + i]);
      }
    }
    if (group < 3) {
      float* into = group == 0 ? &q[0][0] : group == 1 ? &k[0][0] : &v[0][0];
      for (int t = 0; t < count; t++) {
        const T value = rows[size_t(t) * width + channel];
        into[t * D + within] = conv.next(to_float(value));
        if (!TRANSACTION || replay || t < commit) new_history[0] = new_history[1], new_history[1] = new_history[2], new_history[2] = value;
      }
    } else if ((kGroups == 4 || group == 3) && within < count) {
      const T* row = rows + size_t(within) * width + C + Hv * D;
      gate[within] = decay(to_float(row[hv]), a_log, dt_bias);
      beta[within] = sigmoid(to_float(row[Hv + hv]));
    }
    __syncthreads();
    if (const int t = warp; t < count) {
      const float both = normalize<D>(q[t], k[t], lane);
      if (lane == 0) qk[t] = both;
    }
    if (counts && !replay) readers_before = count_reader(arrivals, b * Hk + hk, ratio);
    __syncthreads();

    for (int t = 0; t < count; t++) {
      if (TRANSACTION && !replay && t == commit) store_state();
      float out[1];
      read_token<kLanes>(S, q[t], k[t], {v[t][column]}, qk[t], gate[t], beta[t], part, out);
      if (part == 0) o[t][column] = out[0];
    }
    if (!replay) break;
    pending -= count, rows += size_t(count) * width;
    __syncthreads();  // the shared rows have been read
  }
  if (counts) last = is_last_reader(arrivals, b * Hk + hk, hv % ratio, ratio, readers_before);
  __syncthreads();
  if (warp < tokens) {
    const Part a = reinterpret_cast<const Part*>(o[warp])[lane];
    const float scale = rsqrtf(warp_sum(dot(a, a)) / D + eps);
    T* y = in.y + (size_t(b) * tokens + warp) * Hv * D + hv * D + lane * kItems;
    const float* value = &a.x;
#pragma unroll
    for (int i = 0; i < kItems; i++) y[i] = from_float<T>(value[i] * scale * norm[i] * silu(gating[i]));
  }
  if (group == 2 || (group < 2 && last)) {
#pragma unroll
    for (int i = 0; i < kTaps - 1; i++) history_out[i * C + channel] = new_history[i];
  }
  // It takes as long as a processor takes to write so much: beside the outputs of the warps that have one, not before them.
  if (commit == tokens) store_state();
}

}  // namespace qwen
