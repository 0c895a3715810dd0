// Instruction sets. A file under kernels/ is compiled once per set, into the namespace of its name, and the best one that the machine has is
// taken when the library is loaded:
//
//   widget.h            #define QWEN_WIDGET(SET) namespace SET { void widget(const float* x, float* y, size_t n); }
//                       QWEN_SETS(QWEN_WIDGET)
//   kernels/widget.cc   namespace qwen::QWEN_SET { void widget(...) { ... } }
//   its op              const auto widget = QWEN_BEST(widget);   widget(x, y, n);
#pragma once

#if defined(__x86_64__)
#define QWEN_SETS(X) X(base) X(avx2) X(avx512)
#define QWEN_BEST(name) ::qwen::best(&::qwen::base::name, &::qwen::avx2::name, &::qwen::avx512::name)
#else
#define QWEN_SETS(X) X(base)
#define QWEN_BEST(name) (&::qwen::base::name)
#endif

namespace qwen {

#if defined(__x86_64__)
// avx512: F, BW, DQ, VL and VNNI, as every server since Ice Lake and Zen 4 has. avx2: with FMA and F16C.
// The variable QWEN_EXPORT_CPU_SET (base, avx2, avx512) lowers the choice, for tests.
int instruction_set();

template <typename F>
F* best(F* base, F* avx2, F* avx512) {
  F* all[] = {base, avx2, avx512};
  return all[instruction_set()];
}
#endif

}  // namespace qwen
