#include "moe_kernels.cuh"
#include "quant_stream.cuh"

namespace qwen {

template <typename T>
size_t moe_workspace(const Experts<QuantMatrix>& moe) {
  Work<T, QuantMatrix> work = work_of<T>(moe);
  return place(work, nullptr);
}

template <typename T>
void run_moe(const Experts<QuantMatrix>& moe, const T* x, const T* logits, T* y, void* workspace, cudaStream_t stream) {
  const auto work = routed(moe, x, logits, y, workspace, stream);
  moe.gate_up.bits == 4 ? gate_up<T, Int4Stream>(work, stream) : gate_up<T, Int8Stream>(work, stream);
  moe.down.bits == 4 ? down<T, Int4Stream>(work, stream) : down<T, Int8Stream>(work, stream);
  combine(work, stream);
}

#define INSTANTIATE(T)                                             \
  template size_t moe_workspace<T>(const Experts<QuantMatrix>&);   \
  template void run_moe<T>(const Experts<QuantMatrix>&, const T*, const T*, T*, void*, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
