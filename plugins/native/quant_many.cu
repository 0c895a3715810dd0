#include "product_many.cuh"

#include <algorithm>

namespace qwen {
namespace {

constexpr int kMostOf8Bits = 256;
constexpr int kLastRange = 256;  // rows up to which the order of sums depends on the range and the matrix alone

constexpr int kFewestUnits = 3, kMostSplits = 8;  // that a block should have of a tile which is shared; blocks of a cluster

// How a product of M rows is shared out: by tiles of so many weight rows with so many activation rows.
struct ManyPlan {
  int columns, tiles, all_tiles, splits;
  float cost;  // an estimate, in units of 64 weight rows x 32 activation rows x 128 k of a processor

  // What a tile costs beside its products: sums become results while nothing is multiplied. A tile that is shared costs its exchange, too. By measurements
  // on an H200.
  static constexpr float kTileEnd = 12.0f, kExchange = 12.0f;

  template <int COLUMNS>
  static ManyPlan of(const QuantMatrix& w, int tail_rows, bool swiglu, int M) {
    using Teams = ManyTeams<COLUMNS>;
    ManyPlan plan{COLUMNS};
    const int own = swiglu ? Teams::kTilePanels / 2 : Teams::kTilePanels, most = multiprocessors();
    plan.tiles = ((swiglu ? w.panels() / 2 : w.panels()) + own - 1) / own;
    plan.all_tiles = plan.tiles + (tail_rows + Teams::kTailRows - 1) / Teams::kTailRows;
    const int items = plan.items(M);
    plan.splits = std::max(1, std::min({most / items, w.units() / kFewestUnits, kMostSplits}));
    const float turns = (items * plan.splits + most - 1) / most, work = Teams::kTeams * COLUMNS / 32.0f;
    plan.cost = turns * (float(w.units()) / plan.splits * work + (plan.splits > 1 ? kTileEnd + kExchange : kTileEnd) * work / 16);
    return plan;
  }
  int items(int M) const { return all_tiles * ((M + columns - 1) / columns); }
};

template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
void run_planned(ManyProduct given, const ManyPlan& plan, cudaStream_t stream) {
  given.tiles = plan.tiles, given.all_tiles = plan.all_tiles, given.items = plan.items(given.M), given.splits = plan.splits;
  run_many<T, BITS, GENERAL, COLUMNS, SWIGLU>(given, std::min(multiprocessors(), given.items * plan.splits), stream);
}

// Widths of tiles of many rows, of which the cheapest is taken.
template <int... COLUMNS>
struct Widths {
  template <typename T, int BITS, bool GENERAL, bool SWIGLU>
  static void run(const ManyProduct& given, cudaStream_t stream) {
    ManyPlan best{};
    const auto consider = [&](const ManyPlan& plan) {
      if (best.columns == 0 || plan.cost < best.cost) best = plan;
    };
    (consider(ManyPlan::of<COLUMNS>(given.w, given.tail_rows, SWIGLU, std::max(given.M, kLastRange))), ...);
    ((best.columns == COLUMNS ? run_planned<T, BITS, GENERAL, COLUMNS, SWIGLU>(given, best, stream) : void()), ...);
  }
};
// Of 8 bits wider ones have no room for three units.
template <int BITS>
using WidthsOf = std::conditional_t<BITS == 4, Widths<128, 160, 192, 224, 256>, Widths<128, 160, 192>>;

template <typename T, int BITS, bool GENERAL, bool SWIGLU>
void of_rows(const ManyProduct& given, cudaStream_t stream) {
  const auto narrow = [&](auto columns) {
    constexpr int COLUMNS = decltype(columns)::value;
    run_planned<T, BITS, GENERAL, COLUMNS, SWIGLU>(given, ManyPlan::of<COLUMNS>(given.w, given.tail_rows, SWIGLU, COLUMNS), stream);
  };
  if constexpr (!GENERAL) {
    if (given.M <= 16) return narrow(std::integral_constant<int, 16>{});
    if (given.M <= 32) return narrow(std::integral_constant<int, 32>{});
  }
  if (given.M <= 64) return narrow(std::integral_constant<int, 64>{});
  if (given.M <= 128) return narrow(std::integral_constant<int, 128>{});
  WidthsOf<BITS>::template run<T, BITS, GENERAL, SWIGLU>(given, stream);
}

template <typename T, bool SWIGLU>
void of_format(const ManyProduct& given, cudaStream_t stream) {
  const bool four = given.w.bits == 4;
  if constexpr (std::is_same<T, __half>::value) {
    if (!given.w.zeros && !given.w.wide_scales) return four ? of_rows<T, 4, false, SWIGLU>(given, stream) : of_rows<T, 8, false, SWIGLU>(given, stream);
  }
  four ? of_rows<T, 4, true, SWIGLU>(given, stream) : of_rows<T, 8, true, SWIGLU>(given, stream);
}

// `given` without x.
template <typename T, bool SWIGLU>
void run(ManyProduct given, const T* x, const T* norm, float eps, void* workspace, cudaStream_t stream) {
  given.x = workspace, given.x_rows = (given.M + 7) / 8 * 8;
  arrange<T>(given.w.bits, {x, norm, eps, workspace, given.w.K, true}, ArrangedBlocks{given.x_rows}, given.M, stream);
  of_format<T, SWIGLU>(given, stream);
}

}  // namespace

bool has_quant_many(const QuantMatrix& w, int M) { return M > kFewColumns && (w.bits == 4 || M <= kMostOf8Bits) && has_tensor_cores_90(); }

size_t many_workspace(const QuantMatrix& w, int M) { return size_t((M + 7) / 8 * 8) * arranged_stride(w.K) * 2; }

template <typename T>
void quant_linear_many(const QuantMatrix& w, const T* x, const T* tail, int tail_rows, const T* residual, const T* norm, float eps, T* y, int M, void* workspace,
                       cudaStream_t stream) {
  run<T, false>(ManyProduct{w, nullptr, tail, residual, y, M, w.N, tail_rows, w.N + tail_rows}, x, norm, eps, workspace, stream);
}

template <typename T>
void quant_swiglu_many(const QuantMatrix& w, const T* x, const T* norm, float eps, T* y, int M, void* workspace, cudaStream_t stream) {
  run<T, true>(ManyProduct{w, nullptr, nullptr, nullptr, y, M, w.N / 2, 0, w.N / 2}, x, norm, eps, workspace, stream);
}

#define INSTANTIATE(T)                                                                                                                              \
  template void quant_linear_many<T>(const QuantMatrix&, const T*, const T*, int, const T*, const T*, float, T*, int, void*, cudaStream_t);          \
  template void quant_swiglu_many<T>(const QuantMatrix&, const T*, const T*, float, T*, int, void*, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
