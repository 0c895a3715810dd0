// Instruction sets. A file under kernels/ is compiled once per set, into the namespace of its name, and the best one that the machine has is
// taken when the library is loaded:
//
//   widget.h            #define QWEN_WIDGET(SET) namespace SET { void widget(const float* x, float* y, size_t n); }
//                       QWEN_SETS(QWEN_WIDGET)
//   kernels/widget.cc   namespace qwen::QWEN_SET { void widget(...) { ... } }
//   its op              const auto widget = QWEN_BEST(widget);   widget(x, y, n);
//
// Files under kernels/tiles/ are compiled for `amx`, where the compiler has it (QWEN_AMX), and for `base`, which is an emulation for tests.
// They are used where has_tiles(); all other kernels are then those of avx512.
#pragma once

#if defined(__x86_64__)
#define QWEN_SETS(X) X(base) X(avx2) X(avx512)
#define QWEN_BEST(name) ::qwen::best(&::qwen::base::name, &::qwen::avx2::name, &::qwen::avx512::name)
#else
#define QWEN_SETS(X) X(base)
#define QWEN_BEST(name) (&::qwen::base::name)
#endif

#if defined(QWEN_AMX)
#define QWEN_TILE_SETS(X) X(base) X(amx)
#define QWEN_TILES(name) (::qwen::instruction_set() == ::qwen::kAmx ? &::qwen::amx::name : &::qwen::base::name)
#else
#define QWEN_TILE_SETS(X) X(base)
#define QWEN_TILES(name) (&::qwen::base::name)
#endif

namespace qwen {

enum InstructionSet { kBase, kAvx2, kAvx512, kAmx };

// avx512: F, BW, DQ, VL and VNNI, as every server since Ice Lake and Zen 4 has. avx2: with FMA and F16C. amx: avx512, bf16, and tiles of bytes and of bf16.
// The variable QWEN_EXPORT_CPU_SET lowers the choice, for tests: base, avx2, avx512, amx, or base_tiles, which is base with tiles in plain C++.
InstructionSet instruction_set();

// Whether products of many rows use tiles.
bool has_tiles();

// Whether products of many rows round to bf16 (bf16_tiles.h): where there are tiles and the variable QWEN_EXPORT_CPU_BF16_TILES is 1.
bool has_bf16_tiles();

#if defined(__x86_64__)
template <typename F>
F* best(F* base, F* avx2, F* avx512) {
  F* all[] = {base, avx2, avx512, avx512};
  return all[instruction_set()];
}
#endif

}  // namespace qwen
