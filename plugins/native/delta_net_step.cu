// The decode and verify step of a Gated DeltaNet mixer as kernels of plain arguments, for engines of TensorRT (plugins/tensorrt/step_plugin.py):
// pointers of the inputs, 32-bit numbers, pointers of the outputs, which is the order that quick-deployable plugins pass them in. Grid Hv blocks
// of kHeadThreads; sizes as in delta_net.cuh with B = 1; `eps` has the bits of a float.
// Successors are other memory than what they succeed.
//
// build_ptx.sh compiles this once per ELEMENT, to PTX that the driver of any GPU from SM 80 on takes.

#include "few_tokens.cuh"

#ifndef ELEMENT
#define ELEMENT __half
#endif

namespace qwen {
namespace {

template <int D, bool TRANSACTION>
__device__ inline void step(DeltaNetTensors<ELEMENT> in, const int* accepted, const int* commit, int T, int P, int Hk, int Hv, int eps) {
  const int pending = TRANSACTION ? clamped(*accepted, P) : 0, committed = TRANSACTION ? clamped(*commit, T) : T;
  few_tokens<ELEMENT, D, TRANSACTION>(DeltaNetShape{1, T, Hk, Hv, P, D}, in, pending, committed, __int_as_float(eps), nullptr);
}

}  // namespace

// The registers are as many as it takes not to spill.
#define STEP(D)                                                                                                                                  \
  extern "C" __global__ void __maxnreg__(96) qwen_delta_net_step_##D(                                                                            \
      const ELEMENT* packed, const ELEMENT* conv, const float* a_log, const float* dt_bias, const ELEMENT* norm, const ELEMENT* history,         \
      const float* state, int T, int P, int Hk, int Hv, int eps, ELEMENT* y, ELEMENT* history_out, float* state_out) {                           \
    step<D, false>({packed, conv, a_log, dt_bias, norm, history, state, nullptr, nullptr, nullptr, y, history_out, state_out}, nullptr, nullptr, \
                   T, P, Hk, Hv, eps);                                                                                                           \
  }
#define VERIFY(D)                                                                                                                                \
  extern "C" __global__ void __maxnreg__(128) qwen_delta_net_verify_##D(                                                                         \
      const ELEMENT* packed, const ELEMENT* conv, const float* a_log, const float* dt_bias, const ELEMENT* norm, const ELEMENT* history,         \
      const float* state, const ELEMENT* pending, const int* accepted, const int* commit, int T, int P, int Hk, int Hv, int eps, ELEMENT* y,     \
      ELEMENT* history_out, float* state_out) {                                                                                                  \
    step<D, true>({packed, conv, a_log, dt_bias, norm, history, state, pending, nullptr, nullptr, y, history_out, state_out}, accepted, commit,  \
                  T, P, Hk, Hv, eps);                                                                                                            \
  }

STEP(64)
STEP(128)
VERIFY(64)
VERIFY(128)

}  // namespace qwen
