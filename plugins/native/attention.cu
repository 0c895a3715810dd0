// Which kernels read a call, and how a long past is shared between blocks.

#include "attention.cuh"

#include <algorithm>

#include "attention_few.cuh"
#include "attention_prepare.cuh"
#include "attention_prompt.cuh"
#include "attention_wide.cuh"
#include "device.cuh"

namespace qwen {
namespace {

constexpr size_t kMostPartial = size_t(256) << 20;  // bytes of sums of chunks; more sequences are read by several launches
// Heads of the family have 256 values. Devices with this much shared memory for a block have more of them on the way at a time.
constexpr int kWideHead = 256, kMuchShared = 227 << 10;

int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Whether attention_few makes the new rows itself.
bool is_fresh(const AttentionShape& s) { return s.T <= kMostFresh && s.T * s.group() <= 32; }

// Rows of a block of attention_few.
int block_rows(const AttentionShape& s) {
  const int rows = s.T * s.group();
  return !is_fresh(s) ? 64 : rows <= 8 ? 8 : rows <= 16 ? 16 : 32;
}

// Whether a call is read by blocks that each read all of the past: its rows are enough for a fifth of the processors. Fewer are the end of a
// prompt behind a long past, for which chunks of the past are shared.
bool is_prompt(const AttentionShape& s, const AttentionDevice& device) {
  return !is_fresh(s) && (s.T * s.group() + kPromptRows - 1) / kPromptRows * s.Hkv * 5 > device.processors;
}

int padded_rows(const AttentionShape& s) { return round_up(s.T * s.group(), s.T * s.group() > kPromptRows ? kWideRows : kPromptRows); }

FewPlan plan_of(const AttentionShape& s, const AttentionDevice& device) {
  FewPlan plan{};
  plan.rows = s.T * s.group();
  plan.padded_rows = padded_rows(s);
  const int rows = block_rows(s);
  plan.blocks = (plan.rows + rows - 1) / rows;
  plan.per_block = 1.0f / plan.blocks, plan.per_head = 1.0f / s.group();
  const int room = (s.S + kLeastSlots - 1) / kLeastSlots;
  plan.most_chunks = std::max(1, std::min({kMostChunks, (rows == 64 ? 4096 : 2048) / rows, device.processors / (s.Hkv * plan.blocks), room}));
  return plan;
}

// Bytes of sums of one sequence.
size_t partial_bytes(const AttentionShape& s, const FewPlan& plan) {
  if (plan.most_chunks == 1) return 0;
  return size_t(s.Hkv) * plan.blocks * plan.most_chunks * block_rows(s) * (s.D * sizeof(float) + sizeof(float2));
}

int sequences_together(const AttentionShape& s, const FewPlan& plan) {
  size_t most = std::min(kMostSequences, kAttentionCounters / (s.Hkv * plan.blocks));
  if (const size_t bytes = partial_bytes(s, plan)) most = std::min(most, kMostPartial / bytes);
  return int(std::max<size_t>(1, std::min<size_t>(most, s.B)));
}

size_t query_bytes(const AttentionShape& s) { return is_fresh(s) ? 0 : size_t(s.B) * s.Hkv * padded_rows(s) * s.D * 2; }

template <typename T, int D, int EIGHTS, int MW, int READERS, int HALVES, int MAKERS>
void few_tokens(const AttentionShape& s, const AttentionTensors<T>& in, const FewPlan& plan, const AttentionDevice& device, void* workspace,
                cudaStream_t stream) {
  using Layout = FewLayout<D, EIGHTS, MW, READERS, HALVES, MAKERS>;
  const auto kernel = attention_few<T, D, EIGHTS, MW, READERS, HALVES, MAKERS>;
  static const bool allowed = [&] {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout::kShared), "cudaFuncSetAttribute");
    return true;
  }();
  (void)allowed;
  const int together = sequences_together(s, plan);
  FewWorkspace work{};
  char* memory = static_cast<char*>(workspace);
  work.queries = memory;
  work.partial = reinterpret_cast<float*>(memory + query_bytes(s));
  work.weights = reinterpret_cast<float2*>(work.partial + size_t(together) * s.Hkv * plan.blocks * plan.most_chunks * Layout::kRows * D);
  work.counters = device.counters;
  for (int b = 0; b < s.B; b += together)
    launch(kernel, dim3(device.processors), dim3(Layout::kThreads), Layout::kShared, stream, s, in, plan, work, b, std::min(together, s.B - b));
}

template <typename T, int D, int EIGHTS, int MW, int READERS, int HALVES, int MAKERS, int LIMIT>
void few_tokens_within(const AttentionShape& s, const AttentionTensors<T>& in, const FewPlan& plan, const AttentionDevice& device, void* workspace,
                       cudaStream_t stream) {
  static_assert(FewLayout<D, EIGHTS, MW, READERS, HALVES, MAKERS>::kAllShared <= LIMIT, "more shared memory than the devices have");
  few_tokens<T, D, EIGHTS, MW, READERS, HALVES, MAKERS>(s, in, plan, device, workspace, stream);
}

// 8, 16 or 32 rows of queries that the kernel makes itself, or 64 of attention_prepare.
template <typename T, int D>
void few_tokens_of_rows(const AttentionShape& s, const AttentionTensors<T>& in, const FewPlan& plan, const AttentionDevice& device, void* workspace,
                        cudaStream_t stream) {
  constexpr int kMuch = kMuchShared, kLittle = 99 << 10;
  const int rows = block_rows(s);
  if constexpr (D == kWideHead) {
    if (device.shared_bytes >= kMuchShared) {
      if (rows == 8) return few_tokens_within<T, D, 1, 1, 4, 5, 4, kMuch>(s, in, plan, device, workspace, stream);
      if (rows == 16) return few_tokens_within<T, D, 1, 2, 4, 10, 4, kMuch>(s, in, plan, device, workspace, stream);
      if (rows == 32) return few_tokens_within<T, D, 1, 4, 4, 20, 4, kMuch>(s, in, plan, device, workspace, stream);
      return few_tokens_within<T, D, 1, 8, 8, 22, 0, kMuch>(s, in, plan, device, workspace, stream);
    }
  }
  if (rows == 8) return few_tokens_within<T, D, 1, 1, 2, 3, 4, kLittle>(s, in, plan, device, workspace, stream);
  if (rows == 16) return few_tokens_within<T, D, 1, 2, 2, 6, 4, kLittle>(s, in, plan, device, workspace, stream);
  if (rows == 32) return few_tokens_within<T, D, 1, 4, 4, 4, 4, kLittle>(s, in, plan, device, workspace, stream);
  few_tokens_within<T, D, 1, 8, 8, 8, 0, kLittle>(s, in, plan, device, workspace, stream);
}

template <typename T, int D, int RING>
void prompt(const AttentionShape& s, const AttentionTensors<T>& in, const T* queries, float scale, const AttentionDevice& device, cudaStream_t stream) {
  constexpr int kSlots = 32, kShared = kPromptShared<D, kSlots, RING>;
  const auto kernel = attention_prompt<T, D, kSlots, RING>;
  static const bool allowed = [&] {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), "cudaFuncSetAttribute");
    return true;
  }();
  (void)allowed;
  const int blocks = round_up(s.T * s.group(), kPromptRows) / kPromptRows * s.B * s.Hkv;
  launch(kernel, dim3(blocks), dim3(kPromptWarps * 32), kShared, stream, s, in, queries, padded_rows(s), scale, device.processors);
}

#ifdef QWEN_SM90A
template <typename T>
void wide(const AttentionShape& s, const AttentionTensors<T>& in, const T* queries, float scale, cudaStream_t stream) {
  const auto kernel = attention_wide<T>;
  static const bool allowed = [&] {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kWideShared), "cudaFuncSetAttribute");
    return true;
  }();
  (void)allowed;
  const int blocks = round_up(s.T * s.group(), kWideRows) / kWideRows * s.B * s.Hkv;
  launch(kernel, dim3(blocks), dim3(kWideThreads), kWideShared, stream, s, in, queries, padded_rows(s), scale);
}
#endif

template <typename T, int D>
void attention_of_head(const AttentionShape& s, const AttentionTensors<T>& in, float scale, float eps, const AttentionDevice& device,
                       void* workspace, cudaStream_t stream) {
  const float scale2 = scale * 1.44269504f;
  FewPlan plan = plan_of(s, device);
  plan.scale = scale2, plan.eps = eps;
  if (is_fresh(s)) return few_tokens_of_rows<T, D>(s, in, plan, device, workspace, stream);
  T* queries = static_cast<T*>(workspace);
  const int rows = padded_rows(s) + 2 * s.T;
  launch(attention_prepare<T, D>, dim3((rows + kPrepareRows - 1) / kPrepareRows, s.B * s.Hkv), dim3(kPrepareWarps * 32), 0, stream, s, in, eps, queries,
         padded_rows(s));
  if (!is_prompt(s, device)) return few_tokens_of_rows<T, D>(s, in, plan, device, workspace, stream);
  if constexpr (D == kWideHead) {
#ifdef QWEN_SM90A
    if (device.major == 9) return wide(s, in, queries, scale2, stream);
#endif
    if (device.shared_bytes >= kMuchShared) return prompt<T, D, 6>(s, in, queries, scale2, device, stream);
  }
  prompt<T, D, 4>(s, in, queries, scale2, device, stream);
}

}  // namespace

size_t attention_workspace(const AttentionShape& s, const AttentionDevice& device) {
  if (is_prompt(s, device)) return query_bytes(s);
  const FewPlan plan = plan_of(s, device);
  return query_bytes(s) + sequences_together(s, plan) * partial_bytes(s, plan);
}

template <typename T>
void gated_attention(const AttentionShape& s, const AttentionTensors<T>& in, float scale, float eps, const AttentionDevice& device, void* workspace,
                     cudaStream_t stream) {
  switch (s.D) {
    case 32: return attention_of_head<T, 32>(s, in, scale, eps, device, workspace, stream);
    case 64: return attention_of_head<T, 64>(s, in, scale, eps, device, workspace, stream);
    case 128: return attention_of_head<T, 128>(s, in, scale, eps, device, workspace, stream);
    case 256: return attention_of_head<T, 256>(s, in, scale, eps, device, workspace, stream);
  }
  throw std::runtime_error("GatedAttention: heads must have 32, 64, 128 or 256 values");
}

#define INSTANTIATE(T)                                                                                                                       \
  template void gated_attention<T>(const AttentionShape&, const AttentionTensors<T>&, float, float, const AttentionDevice&, void*, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
