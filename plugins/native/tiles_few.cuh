// Products of up to 8 rows with 4-bit matrices by blocks that have all their weights on their way before the rows are known: what is left then is one wait,
// the norm and the products. Wide matrices give every multiprocessor two blocks of two or three panels, narrow ones a block of one panel, SwiGlu two blocks of
// a gate and an up panel.
#pragma once

#include <algorithm>

#include "few_tiles.cuh"
#include "product_few.cuh"

namespace qwen {

template <int WARPS, int STAGES, int COUNT, int BLOCKS, bool SWIGLU = false>
struct TilesShape {
  static constexpr bool kSwiGlu = SWIGLU;  // then half of the panels are gates
  static constexpr int kWarps = WARPS, kStages = STAGES, kCount = COUNT, kBlocks = BLOCKS;  // COUNT panels; BLOCKS a multiprocessor must have room for
  static constexpr int kMostK = WARPS * (STAGES / COUNT) * kUnit;
  static constexpr int kColumns = COUNT * kPanelRows / (SWIGLU ? 2 : 1);
  static int tiles(int N) { return (N + kColumns - 1) / kColumns; }
};
using WideTiles = TilesShape<8, 4, 2, 3>;
using WidestTiles = TilesShape<8, 6, 3, 3>;
using NarrowTiles = TilesShape<16, 4, 1, 2>;
using GatedTiles = TilesShape<8, 4, 2, 3, true>;

template <typename T, typename Shape>
using TilesTail = RowsTile<T, Shape::kWarps>;
template <typename Panels, typename Shape>
using ShapedTile = PanelsTile<Panels, Shape::kWarps, Shape::kStages, Shape::kCount, Shape::kSwiGlu>;

template <typename Shape>
bool tiles_fit(const FewProduct<QuantMatrix>& given, int blocks_each) {
  const int tails = (given.tail_rows + 7) / 8;
  return given.w.bits == 4 && given.w.K <= Shape::kMostK && Shape::tiles(given.N) + tails <= blocks_each * multiprocessors() && most_shared() >= 128 << 10;
}
inline bool wide_tiles_are_better(const FewProduct<QuantMatrix>& given) {
  return given.N > kSmallN && given.residual == nullptr && tiles_fit<WidestTiles>(given, 2);
}
// Where a warp has one unit, product_few.cuh does not wait for its activations twice either.
inline bool narrow_tiles_are_better(const FewProduct<QuantMatrix>& given) {
  return given.w.units() > NarrowTiles::kWarps && given.w.K >= given.N && given.tail_rows == 0 && tiles_fit<NarrowTiles>(given, 1);
}

// In shared memory: the rows, the sums, the rings. With a residual a thread writes one value.
template <typename Panels, typename Shape>
__global__ void __launch_bounds__(Shape::kWarps * 32, Shape::kBlocks) tiles_few_kernel(const FewProduct<typename Panels::Matrix> given, const int sums_at, const int ring_at) {
  using T = typename Panels::Element;
  using Tail = TilesTail<T, Shape>;
  extern __shared__ __align__(16) uint8_t shared[];
  const int M = given.M, K = given.w.K, units = given.w.units(), width = given.N + given.tail_rows;
  const typename Panels::Rows rows{static_cast<const T*>(given.x), reinterpret_cast<uint4*>(shared), M, K, log_rows_of(M), units * kUnitChunks};
  const int log_rows = rows.log_rows;
  const T *norm = static_cast<const T*>(given.norm), *residual = static_cast<const T*>(given.residual);
  T* y = static_cast<T*>(given.y);
  float* const sums = reinterpret_cast<float*>(shared + sums_at);
  const uint4 weight = rows.first_weight(norm);
  const bool is_tail = int(blockIdx.x) >= given.tiles;
  const int column = int(blockIdx.x) * Shape::kColumns, first = is_tail ? (int(blockIdx.x) - given.tiles) * Tail::kRows : 0;
  const Panels panels(given.w);
  ShapedTile<Panels, Shape> tile(panels, shared + ring_at, column, given.N, (given.w.panels() - 1) * kPanelRows, units);
  const Tail tail{shared + ring_at, K};
  if (is_tail)
    tail.start(static_cast<const T*>(given.tail) + size_t(first) * K, min(Tail::kRows, given.tail_rows - first));
  else
    tile.start();
  wait_for_previous();
  let_next_start();
  const auto place = [&](int i) {  // of value i of this block's, -1 where there is none
    const int at = i & ((kPanelRows << log_rows) - 1), m = at / kPanelRows, n = column + (i >> (log_rows + 4)) * kPanelRows + at % kPanelRows;
    return i < Shape::kColumns << log_rows && m < M && n < given.N ? m * width + n : -1;
  };
  const float added = residual != nullptr && place(threadIdx.x) >= 0 ? to_float(residual[place(threadIdx.x)]) : 0.0f;
  rows.stage(norm, weight, given.eps);
  if (is_tail) {
    tail.run(rows, sums);
    const int m = threadIdx.x / Tail::kRows, r = threadIdx.x % Tail::kRows;
    if (m < M && first + r < given.tail_rows) y[size_t(m) * width + given.N + first + r] = from_float<T>(tail.total(sums, log_rows, threadIdx.x));
    return;
  }
  tile.run(rows, sums);
  for (int i = threadIdx.x; i < Shape::kColumns << log_rows; i += Shape::kWarps * 32) {
    const int at = place(i), p = i >> (log_rows + 4), value = i & ((kPanelRows << log_rows) - 1);
    if (at < 0) continue;
    const float sum = tile.total(sums, log_rows, p, value);
    if constexpr (Shape::kSwiGlu)
      y[at] = from_float<T>(silu(sum) * tile.total(sums, log_rows, p + Shape::kCount / 2, value));
    else
      y[at] = from_float<T>(sum + added);
  }
}

template <typename Panels, typename Shape>
void tiles_few(FewProduct<QuantMatrix> given, cudaStream_t stream) {
  using T = typename Panels::Element;
  using Tile = ShapedTile<Panels, Shape>;
  constexpr auto kernel = tiles_few_kernel<Panels, Shape>;
  static DeviceFlags allowed;
  allowed.once([&] { allow_shared(kernel, size_t(most_shared())); });
  const int log_rows = log_rows_of(given.M), sums_at = int(Panels::Rows::staged_bytes(given.w.units() * kUnitChunks, log_rows));
  const int ring_at = sums_at + Tile::sums_bytes(log_rows), ring = Tile::ring_bytes(Panels::unit_bytes(given.w));
  const int bytes = ring_at + std::max(ring, given.tail_rows > 0 ? TilesTail<T, Shape>::memory_bytes(given.w.K) : 0);
  given.tiles = Shape::tiles(given.N);
  const int tails = (given.tail_rows + TilesTail<T, Shape>::kRows - 1) / TilesTail<T, Shape>::kRows;
  launch(kernel, dim3(given.tiles + tails), dim3(Shape::kWarps * 32), size_t(bytes), stream, given, sums_at, ring_at);
}

}  // namespace qwen
