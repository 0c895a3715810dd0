// Attention over caches of values of 16 bits.

#include "attention_launch.cuh"

namespace qwen {

QWEN_ATTENTION_INSTANCES(PlainCache)

}  // namespace qwen
