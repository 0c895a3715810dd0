#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(QWEN_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qwen {
namespace {

#if defined(QWEN_AMX)
// Linux gives the tile registers to a process that asks for them; kernels before 5.16 do not know the request.
bool take_tiles() {
  constexpr unsigned kTiles = 1u << 22 | 1u << 24 | 1u << 25, kVectors = 1u << 5;  // bf16, tiles, bytes of EDX; vectors of bf16 of EAX
  constexpr long kRequest = 0x1023, kTileData = 18;       // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) == kTiles && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kVectors) &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

struct Choice {
  InstructionSet set = kBase;
  bool tiles = false;
};

const Choice& choice() {
  static const Choice made = [] {
    const char* wanted = std::getenv("QWEN_EXPORT_CPU_SET");
    if (wanted != nullptr && std::strcmp(wanted, "base_tiles") == 0) return Choice{kBase, true};
    Choice best;
#if defined(__x86_64__)
    const char* names[] = {"base", "avx2", "avx512", "amx"};
    int most = kAmx;
    for (int i = kBase; wanted != nullptr && i <= kAmx; i++)
      if (std::strcmp(wanted, names[i]) == 0) most = i;
    if (most >= kAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best.set = kAvx2;
    if (best.set == kAvx2 && most >= kAvx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
      best.set = kAvx512;
#if defined(QWEN_AMX)
    if (best.set == kAvx512 && most >= kAmx && take_tiles()) best = {kAmx, true};
#endif
#endif
    return best;
  }();
  return made;
}

}  // namespace

InstructionSet instruction_set() { return choice().set; }

bool has_tiles() { return choice().tiles; }

bool has_bf16_tiles() {
  static const bool wanted = [] {
    const char* given = std::getenv("QWEN_EXPORT_CPU_BF16_TILES");
    return given != nullptr && std::strcmp(given, "1") == 0;
  }();
  return wanted && has_tiles();
}

}  // namespace qwen
