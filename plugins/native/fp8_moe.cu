#include "fp8_stream.cuh"
#include "moe_kernels.cuh"

namespace qwen {

template <typename T>
size_t moe_workspace(const Experts<Fp8Matrix>& moe) {
  Work<T, Fp8Matrix> work = work_of<T>(moe);
  return place(work, nullptr);
}

template <typename T>
void run_moe(const Experts<Fp8Matrix>& moe, const T* x, const T* logits, T* y, void* workspace, cudaStream_t stream) {
  const auto work = routed(moe, x, logits, y, workspace, stream);
  gate_up<T, Fp8Stream>(work, stream);
  down<T, Fp8Stream>(work, stream);
  combine(work, stream);
}

#define INSTANTIATE(T)                                           \
  template size_t moe_workspace<T>(const Experts<Fp8Matrix>&);   \
  template void run_moe<T>(const Experts<Fp8Matrix>&, const T*, const T*, T*, void*, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
