#include "product_many.cuh"

namespace qwen {
namespace {

// Above, a copy of the weights in the element type costs less than that each 128 rows make their own. Measured on an H200.
constexpr int kMostRows = 256;

template <typename T, int BITS, bool GENERAL, bool SWIGLU>
void of_rows(ManyProduct& given, cudaStream_t stream) {
  // Parts of K that give most multiprocessors a block: of two blocks each up to 64 rows, of one above.
  const int tiles = many_tiles(given.w, SWIGLU), most = given.M <= 64 ? 200 : 132;
  given.splits = 1;
  while (given.splits < 8 && tiles * given.splits * 2 <= most && given.splits * 4 <= given.w.units()) given.splits *= 2;
  if constexpr (!GENERAL) {
    if (given.M <= 16) return run_many<T, BITS, GENERAL, 16, SWIGLU>(given, stream);
    if (given.M <= 32) return run_many<T, BITS, GENERAL, 32, SWIGLU>(given, stream);
  }
  if (given.M <= 64) return run_many<T, BITS, GENERAL, 64, SWIGLU>(given, stream);
  run_many<T, BITS, GENERAL, 128, SWIGLU>(given, stream);
}

template <typename T, bool SWIGLU>
void of_format(ManyProduct given, cudaStream_t stream) {
  const bool four = given.w.bits == 4;
  if constexpr (std::is_same<T, __half>::value) {
    if (!given.w.zeros && !given.w.wide_scales)
      return four ? of_rows<T, 4, false, SWIGLU>(given, stream) : of_rows<T, 8, false, SWIGLU>(given, stream);
  }
  four ? of_rows<T, 4, true, SWIGLU>(given, stream) : of_rows<T, 8, true, SWIGLU>(given, stream);
}

}  // namespace

bool has_quant_many(int M) { return M > kFewColumns && M <= kMostRows && has_tensor_cores_90(); }

template <typename T>
size_t many_workspace(const QuantMatrix& w, int M) {
  return sizeof(T) * M * size_t(arranged_stride(w.K));
}

template <typename T>
void quant_linear_many(const QuantMatrix& w, const T* x, const T* residual, const T* norm, float eps, T* y, int M, int stride, T* plain, void* workspace,
                       cudaStream_t stream) {
  arrange(w.bits, x, norm, eps, static_cast<T*>(workspace), norm != nullptr ? plain : nullptr, M, w.K, stream);
  ManyProduct given{w, workspace, residual, y, M, w.N, stride};
  of_format<T, false>(given, stream);
}

template <typename T>
void quant_swiglu_many(const QuantMatrix& w, const T* x, const T* norm, float eps, T* y, int M, void* workspace, cudaStream_t stream) {
  arrange<T>(w.bits, x, norm, eps, static_cast<T*>(workspace), nullptr, M, w.K, stream);
  ManyProduct given{w, workspace, nullptr, y, M, w.N / 2, w.N / 2};
  of_format<T, true>(given, stream);
}

#define INSTANTIATE(T)                                                                                                                       \
  template size_t many_workspace<T>(const QuantMatrix&, int);                                                                               \
  template void quant_linear_many<T>(const QuantMatrix&, const T*, const T*, const T*, float, T*, int, int, T*, void*, cudaStream_t);        \
  template void quant_swiglu_many<T>(const QuantMatrix&, const T*, const T*, float, T*, int, void*, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
