// Attention over caches of fp8.

#include "attention_launch.cuh"

namespace qwen {

QWEN_ATTENTION_INSTANCES(Fp8Cache)

}  // namespace qwen
