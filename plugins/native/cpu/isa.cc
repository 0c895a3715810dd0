#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace qwen {

#if defined(__x86_64__)
int instruction_set() {
  static const int chosen = [] {
    int best = 0;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
    if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
      best = 2;
    const char* names[] = {"base", "avx2", "avx512"};
    if (const char* wanted = std::getenv("QWEN_EXPORT_CPU_SET"))
      for (int i = 0; i < 3; i++)
        if (std::strcmp(wanted, names[i]) == 0) best = std::min(best, i);
    return best;
  }();
  return chosen;
}
#endif

}  // namespace qwen
