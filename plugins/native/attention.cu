// Attention over caches of values of 16 bits.

#include "attention_launch.cuh"

namespace qwen {

size_t attention_workspace(const AttentionShape& s, const AttentionDevice& device) {
  if (is_prompt(s, device)) return query_bytes(s);
  const FewPlan plan = plan_of(s, device);
  return query_bytes(s) + sequences_together(s, plan) * partial_bytes(s, plan);
}

QWEN_ATTENTION_INSTANCES(PlainCache)

}  // namespace qwen
