// Attention over caches of int8.

#include "attention_launch.cuh"

namespace qwen {

QWEN_ATTENTION_INSTANCES(Int8Cache)

}  // namespace qwen
