// The same few tokens of a Gated DeltaNet mixer where there are more value heads, of all sequences, than processors: then the time is that of
// reading and writing states.
//
// A block of few_tokens.cuh has a processor to itself, and neither reads nor writes while it makes q, k, v and norms. Here a block has a
// fourth of the threads and the columns of a head one part after the other, so a processor has four blocks, of which some are reading. All
// that earlier calls have left is on its way before the kernel before is done: history first, then the state. Every column is read by the same
// instructions as there.
#pragma once

#include "few_tokens.cuh"

namespace qwen {

constexpr int kPartThreads = 128, kPartBlocks = 4;  // of a block; blocks of a processor
// Columns that a lane holds, and of these what it works on at a time: all of them, which shares the reads of q and k, or one, while the next
// is on its way.
constexpr int kHeldColumns = 2, kWorkedColumns = 2;
// Heads of a call from which a block asks for the rest of its state at once: where blocks are many, larger pieces are read faster; where they are
// few, all of them would ask at the same time.
constexpr int kLongQueue = 2048;

// What a block shares: rows of q, k and v as they come and behind the convolution, outputs, gates of the norm, taps.
template <typename T, int D>
constexpr int many_heads_shared(int P, int tokens) {
  const int values = ((P + tokens + kTaps - 1) * 3 + tokens + 3 * kTaps) * D;
  return ((P + tokens) * 3 + tokens) * D * int(sizeof(float)) + values * int(sizeof(T));
}

template <typename T>
__device__ inline void copy_async(T* shared, const T* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(address), "l"(global) : "memory");
}

// Past the first cache.
__device__ inline void store_through(float* to, float4 x) {
  asm volatile("st.global.L1::no_allocate.v4.f32 [%0],{%1,%2,%3,%4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}

// States are larger than the second cache: they are read past what is in it. Written past it they would not be written sooner.
template <typename T, int D, bool TRANSACTION>
__device__ inline void many_heads(DeltaNetShape shape, const DeltaNetTensors<T>& in, const int pending, const int commit, float eps, int* arrivals) {
  constexpr int kLanes = kHeadThreads / D;  // of a column
  constexpr int kQuads = D / (4 * kLanes);  // float4s of a column that a lane holds
  constexpr int kItems = D / 32;            // elements of a row that a lane holds, where a warp holds the row
  constexpr int kStep = kPartThreads / kLanes, kPart = kStep * kWorkedColumns, kParts = D / kPart;  // columns of a turn, of a part
  constexpr int kHeld = kHeldColumns / kWorkedColumns;                                                  // parts
  constexpr int kWarps = kPartThreads / 32, kRows = 2 * kFewTokens;
  constexpr int kPack = 16 / sizeof(T), kUnits = D / kPack;  // elements of 16 bytes; such units of a row of a head
  constexpr int kTapUnits = kUnits * kTaps, kRowUnits = 3 * kUnits;
  using Part = LanePart<D>;
  extern __shared__ __align__(16) float room[];
  __shared__ float qk[kRows], gate[kRows], beta[kRows];
  __shared__ bool last;

  const int hv = blockIdx.x, b = blockIdx.y, tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int Hk = shape.Hk, Hv = shape.Hv, tokens = shape.T, ratio = Hv / Hk, hk = hv / ratio;
  const int total = pending + tokens, most = shape.P + tokens;
  shape.D = D;  // now the compiler knows it
  const int C = shape.channels(), width = shape.width();
  float(*const q)[D] = reinterpret_cast<float(*)[D]>(room), (*const k)[D] = q + most, (*const v)[D] = k + most, (*const o)[D] = v + most;
  T(*const raw)[3 * D] = reinterpret_cast<T(*)[3 * D]>(o + tokens);  // history, pending rows, new rows
  T(*const gating)[D] = reinterpret_cast<T(*)[D]>(raw + kTaps - 1 + most);
  T(*const taps)[kTaps] = reinterpret_cast<T(*)[kTaps]>(gating + tokens);
  const T* history = in.history + size_t(b) * (kTaps - 1) * C;
  T* history_out = in.history_out + size_t(b) * (kTaps - 1) * C;
  const T* waiting = TRANSACTION ? in.pending + size_t(b) * shape.P * width : nullptr;
  const T* rows = in.packed + size_t(b) * tokens * width;

  auto channel_of = [&](int group) { return (group == 0 ? hk : group == 1 ? Hk + hk : 2 * Hk + hv) * D; };  // 0: q, 1: k, 2: v
  auto copy_rows = [&](int first, const T* from, int stride, int count) {
    for (int i = tid; i < count * kRowUnits; i += kPartThreads) {
      const int row = i / kRowUnits, unit = i % kRowUnits, group = unit / kUnits, place = unit % kUnits * kPack;
      copy_async(&raw[first + row][group * D + place], from + size_t(row) * stride + channel_of(group) + place);
    }
  };
  // As in few_tokens.cuh: lane p of a column holds k = 4 (kLanes j + p) + 0..3.
  const int column = tid / kLanes, part = tid % kLanes;
  const size_t at = ((size_t(b) * Hv + hv) * D + column) * D + part * 4;
  float4 S[kHeld][kWorkedColumns][kQuads];
  auto place_of = [&](int p, int c, int j) { return at + size_t(p * kPart + c * kStep) * D + j * kLanes * 4; };
  auto load_part = [&](int p) {
#pragma unroll
    for (int c = 0; c < kWorkedColumns; c++) {
#pragma unroll
      for (int j = 0; j < kQuads; j++) S[p % kHeld][c][j] = __ldcs(reinterpret_cast<const float4*>(in.state + place_of(p, c, j)));
    }
  };
  // What earlier work in the stream has left, the state as well, then what the projection makes.
  copy_rows(0, history, C, kTaps - 1);
  for (int i = tid; i < 3 * kTapUnits; i += kPartThreads)
    copy_async(&taps[0][0] + i * kPack, in.conv + channel_of(i / kTapUnits) * kTaps + i % kTapUnits * kPack);
  if (TRANSACTION) copy_rows(kTaps - 1, waiting, width, pending);
#pragma unroll
  for (int p = 0; p < kHeld && p < kParts; p++) load_part(p);
#if __CUDA_ARCH__ >= 900
  if (const float* rest = in.state + ((size_t(b) * Hv + hv) * D + kHeld * kPart) * D; tid == 0 && int(gridDim.x * gridDim.y) >= kLongQueue)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0],%1;" ::"l"(rest), "n"((D - kHeld * kPart) * D * 4) : "memory");
#endif
  wait_for_previous();
  let_next_start();
  copy_rows(kTaps - 1 + pending, rows, width, tokens);
  for (int i = tid; i < tokens * kUnits; i += kPartThreads)
    copy_async(&gating[i / kUnits][i % kUnits * kPack], rows + size_t(i / kUnits) * width + C + hv * D + i % kUnits * kPack);
  asm volatile("cp.async.commit_group;");
  float a = 0.0f, open = 0.0f;
  if (tid < total) {
    const T* row = (TRANSACTION && tid < pending ? waiting + size_t(tid) * width : rows + size_t(tid - pending) * width) + C + Hv * D;
    a = to_float(row[hv]), open = to_float(row[Hv + hv]);
  }

  if (tid < total) gate[tid] = decay(a, in.a_log[hv], in.dt_bias[hv]), beta[tid] = sigmoid(open);
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
#pragma unroll
  for (int slot = tid; slot < 3 * D; slot += kPartThreads) {
    const int group = slot / D, within = slot % D;
    float* into = (group == 0 ? &q[0][0] : group == 1 ? &k[0][0] : &v[0][0]) + within;
    Channel<T> conv;
#pragma unroll
    for (int i = 0; i < kTaps; i++) conv.taps[i] = to_float(taps[slot][i]);
#pragma unroll
    for (int i = 0; i < kTaps - 1; i++) conv.past[i] = to_float(raw[i][slot]);
    for (int t = 0; t < total; t++) into[t * D] = conv.next(to_float(raw[kTaps - 1 + t][slot]));
  }
  __syncthreads();
  for (int t = warp; t < total; t += kWarps) {
    const float both = normalize<D>(q[t], k[t], lane);
    if (lane == 0) qk[t] = both;
  }
  if (tid == kPartThreads - 1) last = is_last_reader(arrivals, b * Hk + hk, hv % ratio, ratio, count_reader(arrivals, b * Hk + hk, ratio));
  __syncthreads();
  for (int i = tid; i < (kTaps - 1) * kRowUnits; i += kPartThreads) {
    const int row = i / kRowUnits, unit = i % kRowUnits, group = unit / kUnits, place = unit % kUnits * kPack;
    if (group == 2 || last)
      *reinterpret_cast<uint4*>(history_out + row * C + channel_of(group) + place) =
          *reinterpret_cast<const uint4*>(&raw[pending + commit + row][group * D + place]);
  }

#pragma unroll
  for (int p = 0; p < kParts; p++) {
    auto& mine = S[p % kHeld];
    auto store_part = [&] {
#pragma unroll
      for (int c = 0; c < kWorkedColumns; c++) {
#pragma unroll
        for (int j = 0; j < kQuads; j++) store_through(in.state_out + place_of(p, c, j), mine[c][j]);
      }
    };
#pragma unroll 1
    for (int t = 0; t < total; t++) {
      if (TRANSACTION && t == pending + commit) store_part();
      float values[kWorkedColumns], out[kWorkedColumns];
#pragma unroll
      for (int c = 0; c < kWorkedColumns; c++) values[c] = v[t][p * kPart + c * kStep + column];
      read_token<kLanes>(mine, q[t], k[t], values, qk[t], gate[t], beta[t], part, out);
      if (part == 0 && t >= pending) {
#pragma unroll
        for (int c = 0; c < kWorkedColumns; c++) o[t - pending][p * kPart + c * kStep + column] = out[c];
      }
    }
    if (commit == tokens) store_part();
    if (p + kHeld < kParts) load_part(p + kHeld);
  }
  __syncthreads();

  for (int t = warp; t < tokens; t += kWarps) {
    const Part x = reinterpret_cast<const Part*>(o[t])[lane];
    const float scale = rsqrtf(warp_sum(dot(x, x)) / D + eps);
    T* y = in.y + (size_t(b) * tokens + t) * Hv * D + hv * D + lane * kItems;
    const float* value = &x.x;
#pragma unroll
    for (int i = 0; i < kItems; i++)
      y[i] = from_float<T>(value[i] * scale * to_float(in.norm[lane * kItems + i]) * silu(to_float(gating[t][lane * kItems + i])));
  }
}

}  // namespace qwen
