// Which kernels read a call, and how a long past is shared between blocks. Included by a file for each format of caches.
#pragma once

#include "attention.cuh"

#include <algorithm>

#include "attention_few.cuh"
#include "attention_prepare.cuh"
#include "attention_prompt.cuh"
#include "attention_wide.cuh"
#include "device.cuh"

namespace qwen {

constexpr size_t kMostPartial = size_t(256) << 20;  // bytes of sums of chunks; more sequences are read by several launches
// Heads of the family have 256 values. Devices with this much shared memory for a block have more of them on the way at a time.
constexpr int kWideHead = 256, kMuchShared = 227 << 10;

inline int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Whether attention_few makes the new rows itself.
inline bool is_fresh(const AttentionShape& s) { return s.T <= kMostFresh && s.T * s.group() <= 32; }

// Rows of a block of attention_few.
inline int block_rows(const AttentionShape& s) {
  const int rows = s.T * s.group();
  return !is_fresh(s) ? 64 : rows <= 8 ? 8 : rows <= 16 ? 16 : 32;
}

// Whether a call is read by blocks that each read all of the past: its rows are enough for a fifth of the processors. Fewer are the end of a
// prompt behind a long past, for which chunks of the past are shared.
inline bool is_prompt(const AttentionShape& s, const AttentionDevice& device) {
  return !is_fresh(s) && (s.T * s.group() + kPromptRows - 1) / kPromptRows * s.Hkv * 5 > device.processors;
}

inline int padded_rows(const AttentionShape& s) { return round_up(s.T * s.group(), s.T * s.group() > kPromptRows ? kWideRows : kPromptRows); }

inline FewPlan plan_of(const AttentionShape& s, const AttentionDevice& device) {
  FewPlan plan{};
  plan.rows = s.T * s.group();
  plan.padded_rows = padded_rows(s);
  const int rows = block_rows(s);
  plan.blocks = (plan.rows + rows - 1) / rows;
  plan.per_block = 1.0f / plan.blocks, plan.per_head = 1.0f / s.group();
  const int room = (s.S + kLeastSlots - 1) / kLeastSlots;
  plan.most_chunks = std::max(1, std::min({kMostChunks, device.processors / (s.Hkv * plan.blocks), room}));
  return plan;
}

// Bytes of sums of one sequence.
inline size_t partial_bytes(const AttentionShape& s, const FewPlan& plan) {
  if (plan.most_chunks == 1) return 0;
  return size_t(s.Hkv) * plan.blocks * plan.most_chunks * block_rows(s) * (s.D * sizeof(float) + sizeof(float2));
}

inline int sequences_together(const AttentionShape& s, const FewPlan& plan) {
  size_t most = std::min(kMostSequences, kAttentionCounters / (s.Hkv * plan.blocks));
  if (const size_t bytes = partial_bytes(s, plan)) most = std::min(most, kMostPartial / bytes);
  return int(std::max<size_t>(1, std::min<size_t>(most, s.B)));
}

inline size_t query_bytes(const AttentionShape& s) { return is_fresh(s) ? 0 : size_t(s.B) * s.Hkv * padded_rows(s) * s.D * 2; }

template <typename T, typename Cache, int D, int MW, int WARPS, int SLOTS, int HALVES, bool FRESH, int LIMIT>
void few_tokens(const AttentionShape& s, const AttentionTensors<T>& in, const FewPlan& plan, const AttentionDevice& device, void* workspace,
                cudaStream_t stream) {
  constexpr int kShared = FewLayout<Cache, D, MW, WARPS, SLOTS, HALVES, FRESH>::kShared;
  static_assert(kShared + kOwnShared<WARPS> <= LIMIT, "more shared memory than the devices have");
  const auto kernel = attention_few<T, Cache, D, MW, WARPS, SLOTS, HALVES, FRESH>;
  static DeviceFlags allowed;
  allowed.once([&] { check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), "cudaFuncSetAttribute"); });
  const int together = sequences_together(s, plan);
  FewWorkspace work{};
  char* memory = static_cast<char*>(workspace);
  work.queries = memory;
  work.partial = reinterpret_cast<float*>(memory + query_bytes(s));
  work.weights = reinterpret_cast<float2*>(work.partial + size_t(together) * s.Hkv * plan.blocks * plan.most_chunks * MW * kEight * D);
  work.counters = device.counters;
  for (int b = 0; b < s.B; b += together)
    launch(kernel, dim3(device.processors), dim3(WARPS * 32), kShared, stream, s, in, plan, work, b, std::min(together, s.B - b));
}

// 8, 16 or 32 rows of queries that the kernel makes itself, or 64 of attention_prepare.
template <typename T, typename Cache, int D>
void few_tokens_of_rows(const AttentionShape& s, const AttentionTensors<T>& in, const FewPlan& plan, const AttentionDevice& device, void* workspace,
                        cudaStream_t stream) {
  constexpr int kMuch = kMuchShared, kLittle = 99 << 10;
  constexpr bool kBytes = !Cache::kPlain;  // half tiles of bytes are half as large, beside one of values
  constexpr int kMost = kBytes ? 4 : 3, kLeast = kBytes ? 3 : 2;
  const int rows = block_rows(s);
  if constexpr (D == kWideHead) {
    if (device.shared_bytes >= kMuchShared) {
      if (rows == 8) return few_tokens<T, Cache, D, 1, 8, 16, kMost, true, kMuch>(s, in, plan, device, workspace, stream);
      if (rows == 16) return few_tokens<T, Cache, D, 2, 8, 32, kBytes ? 4 : 3, true, kMuch>(s, in, plan, device, workspace, stream);
      if (rows == 32) return few_tokens<T, Cache, D, 4, 8, 32, kBytes ? 9 : 6, true, kMuch>(s, in, plan, device, workspace, stream);
      return few_tokens<T, Cache, D, 8, 8, 32, kBytes ? 20 : 11, false, kMuch>(s, in, plan, device, workspace, stream);
    }
  }
  if (rows == 8) return few_tokens<T, Cache, D, 1, 4, 16, kLeast, true, kLittle>(s, in, plan, device, workspace, stream);
  if (rows == 16) return few_tokens<T, Cache, D, 2, 4, 16, kBytes ? 7 : 5, true, kLittle>(s, in, plan, device, workspace, stream);
  if (rows == 32) return few_tokens<T, Cache, D, 4, 4, 16, kBytes ? 14 : 8, true, kLittle>(s, in, plan, device, workspace, stream);
  few_tokens<T, Cache, D, 8, 8, 16, kBytes ? 12 : 8, false, kLittle>(s, in, plan, device, workspace, stream);
}

template <typename T, typename Cache, int D, int RING>
void prompt(const AttentionShape& s, const AttentionTensors<T>& in, const T* queries, float scale, const AttentionDevice& device, cudaStream_t stream) {
  constexpr int kSlots = 32, kShared = kPromptShared<Cache, D, kSlots, RING>;
  const auto kernel = attention_prompt<T, Cache, D, kSlots, RING>;
  static DeviceFlags allowed;
  allowed.once([&] { check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), "cudaFuncSetAttribute"); });
  const int blocks = round_up(s.T * s.group(), kPromptRows) / kPromptRows * s.B * s.Hkv;
  launch(kernel, dim3(blocks), dim3(kPromptWarps * 32), kShared, stream, s, in, queries, padded_rows(s), scale, device.processors);
}

#ifdef QWEN_SM90A
template <typename T, typename Cache>
void wide(const AttentionShape& s, const AttentionTensors<T>& in, const T* queries, float scale, cudaStream_t stream) {
  const auto kernel = attention_wide<T, Cache>;
  static DeviceFlags allowed;
  allowed.once([&] { check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kWideShared), "cudaFuncSetAttribute"); });
  const int blocks = round_up(s.T * s.group(), kWideRows) / kWideRows * s.B * s.Hkv;
  launch(kernel, dim3(blocks), dim3(kWideThreads), kWideShared, stream, s, in, queries, padded_rows(s), scale);
}
#endif

template <typename T, typename Cache, int D>
void attention_of_head(const AttentionShape& s, const AttentionTensors<T>& in, float scale, float eps, const AttentionDevice& device,
                       void* workspace, cudaStream_t stream) {
  const float scale2 = scale * 1.44269504f;
  FewPlan plan = plan_of(s, device);
  plan.scale = scale2, plan.eps = eps;
  if (is_fresh(s)) return few_tokens_of_rows<T, Cache, D>(s, in, plan, device, workspace, stream);
  T* queries = static_cast<T*>(workspace);
  const int rows = padded_rows(s) + 2 * s.T;
  launch(attention_prepare<T, Cache, D>, dim3((rows + kPrepareRows - 1) / kPrepareRows, s.B * s.Hkv), dim3(kPrepareWarps * 32), 0, stream, s, in, eps, queries,
         padded_rows(s));
  if (!is_prompt(s, device)) return few_tokens_of_rows<T, Cache, D>(s, in, plan, device, workspace, stream);
  if constexpr (D == kWideHead) {
#ifdef QWEN_SM90A
    if (device.major == 9) return wide<T, Cache>(s, in, queries, scale2, stream);
#endif
    if (device.shared_bytes >= kMuchShared) return prompt<T, Cache, D, 6>(s, in, queries, scale2, device, stream);
  }
  prompt<T, Cache, D, 4>(s, in, queries, scale2, device, stream);
}

template <typename T, typename Cache>
void gated_attention(const AttentionShape& s, const AttentionTensors<T>& in, float scale, float eps, const AttentionDevice& device, void* workspace,
                     cudaStream_t stream) {
  if constexpr (Cache::kPlain) {
    if (s.D == 32) return attention_of_head<T, Cache, 32>(s, in, scale, eps, device, workspace, stream);
    if (s.D == 128) return attention_of_head<T, Cache, 128>(s, in, scale, eps, device, workspace, stream);
  }
  switch (s.D) {
    case 64: return attention_of_head<T, Cache, 64>(s, in, scale, eps, device, workspace, stream);
    case 256: return attention_of_head<T, Cache, 256>(s, in, scale, eps, device, workspace, stream);
  }
  throw std::runtime_error("GatedAttention: there is no kernel for heads of this size");
}

#define QWEN_ATTENTION_INSTANCES(CACHE)                                                                                                           \
  template void gated_attention<__half, CACHE>(const AttentionShape&, const AttentionTensors<__half>&, float, float, const AttentionDevice&, void*, \
                                               cudaStream_t);                                                                                       \
  template void gated_attention<__nv_bfloat16, CACHE>(const AttentionShape&, const AttentionTensors<__nv_bfloat16>&, float, float,                  \
                                                      const AttentionDevice&, void*, cudaStream_t);

}  // namespace qwen
