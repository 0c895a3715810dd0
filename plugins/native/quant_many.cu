#include "product_many.cuh"

#include <algorithm>

namespace qwen {
namespace {

// Above, a copy of the weights in the element type costs less than that each 128 rows make their own. Measured on an H200.
constexpr int kMostRows = 256, kRowsTogether = 128;

constexpr int kFewestUnits = 3, kMostSplits = 8;  // that a block should have of a tile which is shared; blocks of a cluster

// How a product is shared out.
struct ManyPlan {
  int tiles, all_tiles, splits, blocks;

  ManyPlan(const QuantMatrix& w, int tail_rows, bool swiglu) {
    const int own = swiglu ? kTilePanels / 2 : kTilePanels, most = multiprocessors();
    tiles = ((swiglu ? w.panels() / 2 : w.panels()) + own - 1) / own, all_tiles = tiles + (tail_rows + kTailRows - 1) / kTailRows;
    splits = std::max(1, std::min({most / all_tiles, w.units() / kFewestUnits, kMostSplits}));
    blocks = std::min(most, all_tiles * splits);
  }
};

template <typename T, int BITS, bool GENERAL, bool SWIGLU>
void of_rows(const ManyProduct& given, int all, int blocks, cudaStream_t stream) {
  if constexpr (!GENERAL) {
    if (all <= 16) return run_many<T, BITS, GENERAL, 16, SWIGLU>(given, blocks, stream);
    if (all <= 32) return run_many<T, BITS, GENERAL, 32, SWIGLU>(given, blocks, stream);
  }
  if (all <= 64) return run_many<T, BITS, GENERAL, 64, SWIGLU>(given, blocks, stream);
  run_many<T, BITS, GENERAL, kRowsTogether, SWIGLU>(given, blocks, stream);
}

template <typename T, bool SWIGLU>
void of_format(const ManyProduct& given, int all, int blocks, cudaStream_t stream) {
  const bool four = given.w.bits == 4;
  if constexpr (std::is_same<T, __half>::value) {
    if (!given.w.zeros && !given.w.wide_scales)
      return four ? of_rows<T, 4, false, SWIGLU>(given, all, blocks, stream) : of_rows<T, 8, false, SWIGLU>(given, all, blocks, stream);
  }
  four ? of_rows<T, 4, true, SWIGLU>(given, all, blocks, stream) : of_rows<T, 8, true, SWIGLU>(given, all, blocks, stream);
}

// `given` without x and what the plan says.
template <typename T, bool SWIGLU>
void run(ManyProduct given, const T* x, const T* norm, float eps, int M, void* workspace, cudaStream_t stream) {
  const ManyPlan plan(given.w, given.tail_rows, SWIGLU);
  given.x = workspace, given.x_rows = (M + 7) / 8 * 8, given.tiles = plan.tiles, given.all_tiles = plan.all_tiles, given.splits = plan.splits;
  arrange<T>(given.w.bits, {x, norm, eps, workspace, given.w.K, true}, ArrangedBlocks{given.x_rows}, M, stream);
  for (int first = 0; first < M; first += kRowsTogether) {
    given.first_row = first, given.M = std::min(kRowsTogether, M - first);
    of_format<T, SWIGLU>(given, M, plan.blocks, stream);
  }
}

}  // namespace

bool has_quant_many(int M) { return M > kFewColumns && M <= kMostRows && has_tensor_cores_90(); }

size_t many_workspace(const QuantMatrix& w, int M) { return size_t((M + 7) / 8 * 8) * arranged_stride(w.K) * 2; }

template <typename T>
void quant_linear_many(const QuantMatrix& w, const T* x, const T* tail, int tail_rows, const T* residual, const T* norm, float eps, T* y, int M, void* workspace,
                       cudaStream_t stream) {
  ManyProduct given{w, nullptr, tail, residual, y, 0, w.N, tail_rows, w.N + tail_rows};
  run<T, false>(given, x, norm, eps, M, workspace, stream);
}

template <typename T>
void quant_swiglu_many(const QuantMatrix& w, const T* x, const T* norm, float eps, T* y, int M, void* workspace, cudaStream_t stream) {
  ManyProduct given{w, nullptr, nullptr, nullptr, y, 0, w.N / 2, 0, w.N / 2};
  run<T, true>(given, x, norm, eps, M, workspace, stream);
}

#define INSTANTIATE(T)                                                                                                                              \
  template void quant_linear_many<T>(const QuantMatrix&, const T*, const T*, int, const T*, const T*, float, T*, int, void*, cudaStream_t);          \
  template void quant_swiglu_many<T>(const QuantMatrix&, const T*, const T*, float, T*, int, void*, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
