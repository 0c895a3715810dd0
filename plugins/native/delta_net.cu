// Columns of the state are independent: S[:,v] <- e^g S[:,v] + k delta_v with delta_v = beta (v - e^g k.S[:,v]). A few lanes hold one column in
// registers for the whole call and meet only in the two dot products. Both are taken with the old state,
//     o_v = q.S'[:,v] = e^g q.S[:,v] + (q.k) delta_v,
// so that one token costs one reduction, not two.
//
// Few tokens (decode, verify): one block per value head does everything, with a processor to itself where there are few heads, beside others
// where there are many. Many tokens (prefill): a parallel kernel makes q, k, v and the gates
// in fp32, the recurrence runs over 32 columns per block, a parallel kernel applies the gated norm; what is pending is replayed before that by
// the kernel for few tokens, without a new token.
//
// Kernels are compiled for each head size D, Dk and Dv alike; on the host it is the shape's.

#include "delta_net.cuh"

#include "device.cuh"
#include "few_tokens.cuh"
#include "many_heads.cuh"

namespace qwen {
namespace {

// The registers are as many as it takes not to spill.
template <typename T, int D, bool TRANSACTION>
__global__ void __maxnreg__(TRANSACTION ? 128 : 96) few_tokens_kernel(DeltaNetShape shape, DeltaNetTensors<T> in, float eps, int* arrivals) {
  const int pending = TRANSACTION ? clamped(in.accepted[blockIdx.y], shape.P) : 0;
  const int commit = TRANSACTION ? clamped(in.commit[blockIdx.y], shape.T) : shape.T;
  few_tokens<T, D, TRANSACTION>(shape, in, pending, commit, eps, arrivals);
}

template <typename T, int D, bool TRANSACTION>
__global__ void __launch_bounds__(kPartThreads, kPartBlocks) many_heads_kernel(DeltaNetShape shape, DeltaNetTensors<T> in, float eps, int* arrivals) {
  const int pending = TRANSACTION ? clamped(in.accepted[blockIdx.y], shape.P) : 0;
  const int commit = TRANSACTION ? clamped(in.commit[blockIdx.y], shape.T) : shape.T;
  many_heads<T, D, TRANSACTION>(shape, in, pending, commit, eps, arrivals);
}

// N neighboring elements, by one load where they are `whole`: their address is a multiple of their size.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T item[N];

  __device__ Pack(const T* from, bool whole) {
    if (whole) {
      *this = *reinterpret_cast<const Pack*>(from);
    } else {
#pragma unroll
      for (int n = 0; n < N; n++) item[n] = from[n];
    }
  }
};

// Convolution and SiLU of N neighboring channels at token `t`; rows before the first token are in the history.
template <int N, typename T>
__device__ inline void convolve(const T* packed, const T* history, const T* conv, int t, int channel, int C, int width, float* out) {
  const bool whole = width % N == 0 && (reinterpret_cast<uintptr_t>(packed) | reinterpret_cast<uintptr_t>(history) | reinterpret_cast<uintptr_t>(conv)) % 16 == 0;
  float sum[N] = {};
  float taps[N][kTaps];
#pragma unroll
  for (int n = 0; n < N; n++) {
    const Pack<T, kTaps> own(conv + (channel + n) * kTaps, whole);
#pragma unroll
    for (int i = 0; i < kTaps; i++) taps[n][i] = to_float(own.item[i]);
  }
#pragma unroll
  for (int i = 0; i < kTaps; i++) {
    const int row = t + i - (kTaps - 1);
    const Pack<T, N> values(row < 0 ? history + (row + kTaps - 1) * C + channel : packed + size_t(row) * width + channel, whole);
#pragma unroll
    for (int n = 0; n < N; n++) sum[n] += to_float(values.item[n]) * taps[n][i];
  }
#pragma unroll
  for (int n = 0; n < N; n++) out[n] = silu(sum[n]);
}

// ---- many tokens ----

constexpr int kChunk = 16;    // tokens per stage of the recurrence
constexpr int kSplit = 8;     // lanes per column
constexpr int kTwo = 2;       // columns of a lane, which reads keys and queries from shared memory once for both
constexpr int kColumns = 32;  // columns per block
constexpr int kThreads = kColumns / kTwo * kSplit;

// fp32, tokens padded to whole chunks with tokens that leave the state alone.
struct Workspace {
  float* qk;     // [B,Hk,T',2,D]
  float* v;      // [B,Hv,T',D]
  float* o;      // [B,Hv,T',D]
  float* dot;    // [B,Hk,T']       q.k
  float* gates;  // [B,Hv,T',2]     decay, beta
};

int padded(int tokens) { return (tokens + kChunk - 1) / kChunk * kChunk; }

Workspace divide(const DeltaNetShape& s, void* memory) {
  const size_t n = size_t(s.B) * padded(s.T);
  Workspace w;
  w.qk = static_cast<float*>(memory);
  w.v = w.qk + n * s.Hk * 2 * s.D;
  w.o = w.v + n * s.Hv * s.D;
  w.dot = w.o + n * s.Hv * s.D;
  w.gates = w.dot + n * s.Hk;
  return w;
}

// Tokens of sequence b that the recurrence reads. A commit in the middle is a padded sequence: what follows must leave the state alone, and its
// outputs are not needed. With commit = 0 the outputs are, and the state is stored before the first token.
__device__ inline int read_tokens(const int64_t* commit, int b, int tokens) {
  const int n = commit == nullptr ? tokens : clamped(commit[b], tokens);
  return n == 0 ? tokens : n;
}

// A warp makes one token of one key head (q and k) or of one value head (v and the gates).
template <typename T, int D>
__global__ void prepare_kernel(DeltaNetShape shape, DeltaNetTensors<T> in, Workspace out, int padded_tokens) {
  using Part = LanePart<D>;
  constexpr int kItems = D / 32;
  shape.D = D;
  wait_for_previous();
  let_next_start();
  const int lane = threadIdx.x % 32, t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, b = blockIdx.z;
  const int Hk = shape.Hk, Hv = shape.Hv, C = shape.channels(), width = shape.width();
  if (t >= padded_tokens) return;
  const bool real = t < read_tokens(in.commit, b, shape.T);
  const T* packed = in.packed + size_t(b) * shape.T * width;
  const T* history = in.history + size_t(b) * (kTaps - 1) * C;
  auto part = [&](int channel) {
    Part u{};
    if (real) convolve<kItems>(packed, history, in.conv, t, channel, C, width, &u.x);
    return u;
  };
  if (int(blockIdx.y) < Hk) {
    const int h = blockIdx.y;
    Part q = part(h * D + lane * kItems), k = part((Hk + h) * D + lane * kItems);
    const float sq = rsqrtf(warp_sum(dot(q, q)) + kL2Eps) * rsqrtf(float(D));
    const float sk = rsqrtf(warp_sum(dot(k, k)) + kL2Eps);
    q = scaled(q, sq), k = scaled(k, sk);
    const float qk = warp_sum(dot(q, k));
    const size_t row = (size_t(b) * Hk + h) * padded_tokens + t;
    reinterpret_cast<Part*>(out.qk + row * 2 * D)[lane] = q;
    reinterpret_cast<Part*>(out.qk + row * 2 * D + D)[lane] = k;
    if (lane == 0) out.dot[row] = qk;
  } else {
    const int h = blockIdx.y - Hk;
    const size_t row = (size_t(b) * Hv + h) * padded_tokens + t;
    reinterpret_cast<Part*>(out.v + row * D)[lane] = part((2 * Hk + h) * D + lane * kItems);
    if (lane == 0) {
      const T* gates = packed + size_t(real ? t : 0) * width + C + Hv * D;
      out.gates[row * 2] = real ? decay(to_float(gates[h]), in.a_log[h], in.dt_bias[h]) : 1.0f;
      out.gates[row * 2 + 1] = real ? sigmoid(to_float(gates[Hv + h])) : 0.0f;
    }
  }
}

template <int N>
__device__ inline float sum(const float* x) {
  if constexpr (N == 1) return x[0];
  else return sum<N / 2>(x) + sum<N / 2>(x + N / 2);
}

template <int D>
__global__ void __launch_bounds__(kThreads) recurrence_kernel(
    DeltaNetShape shape, const float* state, float* state_out, const int64_t* commit, Workspace w, int padded_tokens) {
  constexpr int kQuads = D / (4 * kSplit);  // float4s of a column that a lane holds
  struct Stage {
    float qk[kChunk][2][D], v[kChunk][kColumns], gates[kChunk][2], dot[kChunk];
  };
  __shared__ __align__(16) Stage stage[2];
  __shared__ float o[kChunk][kColumns];
  const int first = blockIdx.x * kColumns, hv = blockIdx.y, b = blockIdx.z, tid = threadIdx.x;
  const int hk = hv / (shape.Hv / shape.Hk);
  const int column = tid / kSplit, part = tid % kSplit;  // and the column kColumns / kTwo further
  const size_t key_row = (size_t(b) * shape.Hk + hk) * padded_tokens, value_row = (size_t(b) * shape.Hv + hv) * padded_tokens;
  const size_t at = ((size_t(b) * shape.Hv + hv) * D + first + column) * D + part * 4;
  constexpr int kNext = kColumns / kTwo;

  float4 S[kTwo][kQuads];  // k = 32 j + 4 part + 0..3
#pragma unroll
  for (int n = 0; n < kTwo; n++) {
#pragma unroll
    for (int j = 0; j < kQuads; j++) S[n][j] = *reinterpret_cast<const float4*>(state + at + n * kNext * D + j * 32);
  }
  const bool keep = commit == nullptr || commit[b] > 0;
  auto store_state = [&] {
#pragma unroll
    for (int n = 0; n < kTwo; n++) {
#pragma unroll
      for (int j = 0; j < kQuads; j++) *reinterpret_cast<float4*>(state_out + at + n * kNext * D + j * 32) = S[n][j];
    }
  };
  wait_for_previous();
  let_next_start();
  if (!keep) store_state();

  auto fetch = [&](Stage& into, int t) {
    const float* qk = w.qk + (key_row + t) * 2 * D;
#pragma unroll
    for (int i = 0; i < kChunk * 2 * D / 4 / kThreads; i++)
      copy_async(&into.qk[0][0][0] + (i * kThreads + tid) * 4, qk + (i * kThreads + tid) * 4);
    static_assert(kChunk * kColumns / 4 == kThreads, "a thread for four values");
    constexpr int kFours = kColumns / 4;
    copy_async(&into.v[tid / kFours][tid % kFours * 4], w.v + (value_row + t + tid / kFours) * D + first + tid % kFours * 4);
    if (tid < kChunk * 2 / 4)
      copy_async(&into.gates[0][0] + tid * 4, w.gates + (value_row + t) * 2 + tid * 4);
    else if (tid >= 32 && tid < 32 + kChunk / 4)
      copy_async(into.dot + (tid - 32) * 4, w.dot + key_row + t + (tid - 32) * 4);
    asm volatile("cp.async.commit_group;");
  };

  fetch(stage[0], 0);
  for (int t0 = 0, now = 0; t0 < padded_tokens; t0 += kChunk, now ^= 1) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    if (t0 + kChunk < padded_tokens) fetch(stage[now ^ 1], t0 + kChunk);
    const Stage& in = stage[now];
#pragma unroll 4
    for (int i = 0; i < kChunk; i++) {
      const float4* query = reinterpret_cast<const float4*>(in.qk[i][0]);
      const float4* key = reinterpret_cast<const float4*>(in.qk[i][1]);
      float4 k[kQuads];
      float sk[kTwo][kQuads], sq[kTwo][kQuads], a[kTwo], c[kTwo];
#pragma unroll
      for (int j = 0; j < kQuads; j++) {
        k[j] = key[j * 8 + part];
        const float4 q = query[j * 8 + part];
#pragma unroll
        for (int n = 0; n < kTwo; n++) {
          sk[n][j] = S[n][j].x * k[j].x + S[n][j].y * k[j].y + S[n][j].z * k[j].z + S[n][j].w * k[j].w;
          sq[n][j] = S[n][j].x * q.x + S[n][j].y * q.y + S[n][j].z * q.z + S[n][j].w * q.w;
        }
      }
#pragma unroll
      for (int n = 0; n < kTwo; n++) a[n] = sum<kQuads>(sk[n]), c[n] = sum<kQuads>(sq[n]);
#pragma unroll
      for (int step = 1; step < kSplit; step *= 2) {
#pragma unroll
        for (int n = 0; n < kTwo; n++) {
          a[n] += __shfl_xor_sync(0xffffffffu, a[n], step);
          c[n] += __shfl_xor_sync(0xffffffffu, c[n], step);
        }
      }
      const float e = in.gates[i][0], beta = in.gates[i][1], both = in.dot[i];
#pragma unroll
      for (int n = 0; n < kTwo; n++) {
        const float delta = beta * (in.v[i][column + n * kNext] - e * a[n]);
        if (part == 0) o[i][column + n * kNext] = e * c[n] + both * delta;
#pragma unroll
        for (int j = 0; j < kQuads; j++) {
          float4& s = S[n][j];
          s.x = e * s.x + delta * k[j].x, s.y = e * s.y + delta * k[j].y;
          s.z = e * s.z + delta * k[j].z, s.w = e * s.w + delta * k[j].w;
        }
      }
    }
    __syncthreads();
    for (int i = tid; i < kChunk * kColumns; i += kThreads)
      w.o[(value_row + t0 + i / kColumns) * D + first + i % kColumns] = o[i / kColumns][i % kColumns];
  }
  if (keep) store_state();
}

// A warp per token and value head.
template <typename T, int D>
__global__ void gated_norm_kernel(DeltaNetShape shape, DeltaNetTensors<T> in, float eps, const float* o, int padded_tokens) {
  using Part = LanePart<D>;
  constexpr int kItems = D / 32;
  shape.D = D;
  wait_for_previous();
  let_next_start();
  const int lane = threadIdx.x % 32, t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, h = blockIdx.y, b = blockIdx.z;
  if (t >= shape.T) return;
  const int Hv = shape.Hv, C = shape.channels(), width = shape.width();
  const Part a = reinterpret_cast<const Part*>(o + ((size_t(b) * Hv + h) * padded_tokens + t) * D)[lane];
  const float scale = rsqrtf(warp_sum(dot(a, a)) / D + eps);
  const T* packed = in.packed + (size_t(b) * shape.T + t) * width;
  const T* z = packed + C + h * D + lane * kItems;
  T* y = in.y + ((size_t(b) * shape.T + t) * Hv + h) * D + lane * kItems;
  const float* value = &a.x;
#pragma unroll
  for (int i = 0; i < kItems; i++) y[i] = from_float<T>(value[i] * scale * to_float(in.norm[lane * kItems + i]) * silu(to_float(z[i])));
}

// The three rows of (history | qkv) before the first token that is not committed.
template <typename T>
__global__ void history_kernel(DeltaNetShape shape, DeltaNetTensors<T> in) {
  wait_for_previous();
  let_next_start();
  const int C = shape.channels(), c = blockIdx.x * blockDim.x + threadIdx.x, b = blockIdx.y;
  if (c >= C) return;
  const int commit = in.commit == nullptr ? shape.T : clamped(in.commit[b], shape.T);
  T rows[kTaps - 1];
#pragma unroll
  for (int i = 0; i < kTaps - 1; i++) {
    const int row = commit + i - (kTaps - 1);
    rows[i] = row < 0 ? in.history[(size_t(b) * (kTaps - 1) + row + kTaps - 1) * C + c]
                      : in.packed[(size_t(b) * shape.T + row) * shape.width() + c];
  }
#pragma unroll
  for (int i = 0; i < kTaps - 1; i++) in.history_out[(size_t(b) * (kTaps - 1) + i) * C + c] = rows[i];
}

bool in_one_kernel(const DeltaNetShape& s) { return s.T <= kFewTokens && s.B <= 256; }

// Value heads of all sequences from which blocks share processors: more than the largest devices have.
constexpr int kManyHeads = 150;

// Copies of 16 bytes begin at multiples of 16.
template <typename T>
bool is_aligned(const DeltaNetShape& s, const DeltaNetTensors<T>& in) {
  auto whole = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  return s.width() * sizeof(T) % 16 == 0 && whole(in.packed) && whole(in.pending) && whole(in.history) && whole(in.history_out) && whole(in.conv);
}

template <typename T, int D>
void many_heads(const DeltaNetShape& s, const DeltaNetTensors<T>& in, float eps, int* arrivals, cudaStream_t stream) {
  static DeviceFlags allowed;
  allowed.once([&] {
    const int most = many_heads_shared<T, D>(kFewTokens, kFewTokens);
    check(cudaFuncSetAttribute(many_heads_kernel<T, D, false>, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "cudaFuncSetAttribute");
    check(cudaFuncSetAttribute(many_heads_kernel<T, D, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "cudaFuncSetAttribute");
  });
  launch(in.accepted == nullptr ? many_heads_kernel<T, D, false> : many_heads_kernel<T, D, true>, dim3(s.Hv, s.B), dim3(kPartThreads),
         many_heads_shared<T, D>(s.P, s.T), stream, s, in, eps, arrivals);
}

template <typename T, int D>
void few_tokens(const DeltaNetShape& s, const DeltaNetTensors<T>& in, float eps, int* arrivals, int arrivals_size, cudaStream_t stream) {
  if (s.B * s.Hk > arrivals_size) throw std::runtime_error("DeltaNet: more key heads than counters");
  if (s.B * s.Hv >= kManyHeads && s.P <= kFewTokens && is_aligned(s, in)) return many_heads<T, D>(s, in, eps, arrivals, stream);
  launch(in.accepted == nullptr ? few_tokens_kernel<T, D, false> : few_tokens_kernel<T, D, true>, dim3(s.Hv, s.B), dim3(kHeadThreads), 0, stream, s, in, eps,
         arrivals);
}

template <typename T, int D>
void delta_net_of_head(
    const DeltaNetShape& s, const DeltaNetTensors<T>& given, float eps, void* workspace, int* arrivals, int arrivals_size, cudaStream_t stream) {
  if (in_one_kernel(s)) return few_tokens<T, D>(s, given, eps, arrivals, arrivals_size, stream);
  DeltaNetTensors<T> in = given;
  if (in.accepted != nullptr && s.P > 0) {
    few_tokens<T, D>(DeltaNetShape{s.B, 0, s.Hk, s.Hv, s.P, D}, in, eps, arrivals, arrivals_size, stream);
    in.state = in.state_out, in.history = in.history_out;
  }
  const Workspace w = divide(s, workspace);
  const int tokens = padded(s.T), per_block = 4;
  launch(prepare_kernel<T, D>, dim3((tokens + per_block - 1) / per_block, s.Hk + s.Hv, s.B), dim3(per_block * 32), 0, stream, s, in, w, tokens);
  launch(history_kernel<T>, dim3((s.channels() + 255) / 256, s.B), dim3(256), 0, stream, s, in);
  launch(recurrence_kernel<D>, dim3(D / kColumns, s.Hv, s.B), dim3(kThreads), 0, stream, s, in.state, in.state_out, in.commit, w, tokens);
  launch(gated_norm_kernel<T, D>, dim3((s.T + per_block - 1) / per_block, s.Hv, s.B), dim3(per_block * 32), 0, stream, s, in, eps, w.o, tokens);
}

}  // namespace

size_t delta_net_workspace(const DeltaNetShape& s) {
  if (in_one_kernel(s)) return 0;
  return sizeof(float) * size_t(s.B) * padded(s.T) * (size_t(s.Hk) * (2 * s.D + 1) + size_t(s.Hv) * (2 * s.D + 2));
}

template <typename T>
void delta_net(const DeltaNetShape& s, const DeltaNetTensors<T>& given, float eps, void* workspace, int* arrivals, int arrivals_size, cudaStream_t stream) {
  if (!takes_head(s.D)) throw std::runtime_error("DeltaNet: heads must have 64 or 128 values");
  const auto run = s.D == 64 ? delta_net_of_head<T, 64> : delta_net_of_head<T, 128>;
  run(s, given, eps, workspace, arrivals, arrivals_size, stream);
}

#define INSTANTIATE(T) \
  template void delta_net<T>(const DeltaNetShape&, const DeltaNetTensors<T>&, float, void*, int*, int, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
