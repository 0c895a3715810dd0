#include "product_many.cuh"

#include <algorithm>
#include <array>

namespace qwen {
namespace {

constexpr int kFewestUnits = 3, kMostSplits = 8;  // that a block should have of a tile which is shared; blocks of a cluster
constexpr int kLastRange = 256;                   // rows up to which the order of sums depends on the range and the matrix alone
// Of more rows a copy of so few weights costs less than tiles that do not fill the device. Measured on an H200: 2 M and 4 M weights are better with the
// copy, 7 M to 100 M without it, of up to 2048 rows by 4 to 50 %, except one of 10 M, which loses 6 % of 2048 rows.
constexpr int64_t kFewestWeights = 5 << 20;

// Weights without zeros and with scales in fp16, for activations in fp16: Weights<T, BITS, false>.
template <typename T>
bool is_plain(const QuantMatrix& w) {
  return std::is_same<T, __half>::value && !w.zeros && !w.wide_scales;
}

// Clusters of so many blocks, each with a processor for itself, that run at the same time. There are fewer than the processors would make, for a cluster
// stays within a part of the device.
int clusters_at_once(int blocks) {
  static const std::array<int, kMostSplits + 1> counts = [] {
    std::array<int, kMostSplits + 1> most{};
    for (int i = 1; i <= kMostSplits; i++) most[i] = i == 1 ? multiprocessors() : many_clusters<__half, 4, false, 128, false>(i);
    return most;
  }();
  return counts[blocks];
}

// How a product of M rows is shared out: by tiles of so many weight rows with so many activation rows, each by a cluster of `splits` blocks.
struct ManyPlan {
  int columns, tiles, all_tiles, splits;
  float time;

  // Microseconds, of an H200, which fit all of its times within some percent: of 128 k of 192 x 128 sums of a block, of the end of a tile, in which nothing
  // is multiplied, and of the exchange of the 64 sums of a thread.
  static constexpr float kUnitTime = 1.12f, kEnd = 2.0f, kExchange = 3.0f;

  template <int COLUMNS>
  static ManyPlan of(const QuantMatrix& w, int tail_rows, bool swiglu, int M) {
    using Teams = ManyTeams<COLUMNS>;
    ManyPlan plan{COLUMNS};
    const int own = swiglu ? Teams::kTilePanels / 2 : Teams::kTilePanels, units = w.units();
    plan.tiles = ((swiglu ? w.panels() / 2 : w.panels()) + own - 1) / own;
    plan.all_tiles = plan.tiles + (tail_rows + Teams::kTailRows - 1) / Teams::kTailRows;
    const int items = plan.items(M);
    const float unit_time = kUnitTime * Teams::kTeams * COLUMNS / (3 * 128), exchange = kExchange * COLUMNS / 128;
    for (int splits = 1; splits <= std::max(1, std::min(units / kFewestUnits, kMostSplits)); splits++) {
      const int at_once = clusters_at_once(splits), turns = at_once > 0 ? (items + at_once - 1) / at_once : 0;
      if (turns == 0 || (splits > 1 && turns > 1)) continue;
      const float time = turns * ((units + splits - 1) / splits * unit_time + kEnd + (splits > 1 ? exchange : 0.0f));
      if (splits == 1 || time < plan.time) plan.splits = splits, plan.time = time;
    }
    return plan;
  }
  int items(int M) const { return all_tiles * ((M + columns - 1) / columns); }
};

template <typename T, int BITS, bool GENERAL, int COLUMNS, bool SWIGLU>
void run_planned(ManyProduct given, const ManyPlan& plan, cudaStream_t stream) {
  given.tiles = plan.tiles, given.all_tiles = plan.all_tiles, given.splits = plan.splits;
  given.items = plan.all_tiles * ((given.M + COLUMNS - 1) / COLUMNS);
  run_many<T, BITS, GENERAL, COLUMNS, SWIGLU>(given, std::min(multiprocessors(), given.items * plan.splits), stream);
}

// Widths of tiles of many rows, of which the fastest is taken.
template <int... COLUMNS>
struct Widths {
  template <typename T, int BITS, bool GENERAL, bool SWIGLU>
  static void run(const ManyProduct& given, cudaStream_t stream) {
    ManyPlan best{};
    const auto consider = [&](const ManyPlan& plan) {
      if (best.columns == 0 || plan.time < best.time) best = plan;
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
  if (given.M > 128) return WidthsOf<BITS>::template run<T, BITS, GENERAL, SWIGLU>(given, stream);
  if (given.M > 64)
    return run_planned<T, BITS, GENERAL, 128, SWIGLU>(given, ManyPlan::of<128>(given.w, given.tail_rows, SWIGLU, given.M), stream);
  const ManyPlan plan = ManyPlan::of<64>(given.w, given.tail_rows, SWIGLU, given.M);  // for narrower tiles, too: sums have the same order
  if constexpr (!GENERAL) {
    if (given.M <= 16) return run_planned<T, BITS, GENERAL, 16, SWIGLU>(given, plan, stream);
    if (given.M <= 32) return run_planned<T, BITS, GENERAL, 32, SWIGLU>(given, plan, stream);
  }
  run_planned<T, BITS, GENERAL, 64, SWIGLU>(given, plan, stream);
}

template <typename T, bool SWIGLU>
void of_format(const ManyProduct& given, cudaStream_t stream) {
  const bool four = given.w.bits == 4;
  if constexpr (std::is_same<T, __half>::value) {
    if (is_plain<T>(given.w)) return four ? of_rows<T, 4, false, SWIGLU>(given, stream) : of_rows<T, 8, false, SWIGLU>(given, stream);
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

// Other formats make weights by more instructions, or larger units; of more rows than 256 they are not measured, and have a copy.
template <typename T>
bool has_quant_many(const QuantMatrix& w, int M) {
  return M > kFewColumns && has_tensor_cores_90() && (M <= kLastRange || (w.bits == 4 && is_plain<T>(w) && int64_t(w.N) * w.K >= kFewestWeights));
}

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
  template bool has_quant_many<T>(const QuantMatrix&, int);                                                                                         \
  template void quant_linear_many<T>(const QuantMatrix&, const T*, const T*, int, const T*, const T*, float, T*, int, void*, cudaStream_t);          \
  template void quant_swiglu_many<T>(const QuantMatrix&, const T*, const T*, float, T*, int, void*, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
