// Products of up to 8 normalized rows with matrices so wide that their blocks, of three panels each, fill all multiprocessors twice, and with rows so
// short that all weights are on their way before the rows are known. What is left then is one wait, the norm and the products.
#pragma once

#include "few_tiles.cuh"
#include "product_few.cuh"

namespace qwen {

constexpr int kWideWarps = 8, kWideStages = 6, kWidePanels = 3, kWideTailLoads = 8;
constexpr int kWideK = kWideWarps * kWideStages / kWidePanels * kUnit;  // what is on its way at a time

template <typename Panels>
using WideTile = PanelsTile<Panels, kWideWarps, kWideStages, kWidePanels>;
template <typename T>
using WideTail = RowsTile<T, kWideWarps, kWideTailLoads>;

inline int wide_tiles(int N) { return (N + kWidePanels * kPanelRows - 1) / (kWidePanels * kPanelRows); }

inline bool wide_is_better(const FewProduct<QuantMatrix>& given) {
  const int tails = (given.tail_rows + 7) / 8;
  return given.norm != nullptr && given.residual == nullptr && given.w.bits == 4 && given.N > kSmallN && given.w.K <= kWideK &&
         wide_tiles(given.N) + tails <= 2 * multiprocessors() && most_shared() >= 128 << 10;
}

// In shared memory: the rows, the sums, the rings.
template <typename Panels>
__global__ void __launch_bounds__(kWideWarps * 32, 3) wide_few_kernel(const FewProduct<typename Panels::Matrix> given, const int sums_at, const int ring_at) {
  using T = typename Panels::Element;
  extern __shared__ __align__(16) uint8_t shared[];
  const int M = given.M, K = given.w.K, log_rows = log_rows_of(M), units = given.w.units(), width = given.N + given.tail_rows;
  const FewRows<T> rows{static_cast<const T*>(given.x), reinterpret_cast<uint4*>(shared), M, K, log_rows, units * kUnitChunks};
  const T* norm = static_cast<const T*>(given.norm);
  T* y = static_cast<T*>(given.y);
  float* const sums = reinterpret_cast<float*>(shared + sums_at);
  const uint4 weight = rows.first_weight(norm);
  const bool is_tail = int(blockIdx.x) >= given.tiles;
  const int column = int(blockIdx.x) * kWidePanels * kPanelRows, first = is_tail ? (int(blockIdx.x) - given.tiles) * WideTail<T>::kRows : 0;
  const Panels panels(given.w);
  WideTile<Panels> tile(panels, shared + ring_at, column, kPanelRows, (given.w.panels() - 1) * kPanelRows, units);
  WideTail<T> tail(static_cast<const T*>(given.tail) + size_t(first) * K, is_tail ? min(WideTail<T>::kRows, given.tail_rows - first) : 0, K);
  if (!is_tail) tile.start();
  wait_for_previous();
  let_next_start();
  rows.stage(norm, weight, given.eps);
  if (is_tail) {
    tail.run(rows, sums);
    const int m = threadIdx.x / WideTail<T>::kRows, r = threadIdx.x % WideTail<T>::kRows;
    if (m < M && first + r < given.tail_rows) y[size_t(m) * width + given.N + first + r] = from_float<T>(tail.total(sums, log_rows, threadIdx.x));
    return;
  }
  tile.run(rows, sums);
  for (int i = threadIdx.x; i < kWidePanels * kPanelRows << log_rows; i += kWideWarps * 32) {
    const int p = i >> (log_rows + 4), at = i & ((kPanelRows << log_rows) - 1), m = at / kPanelRows, n = column + p * kPanelRows + at % kPanelRows;
    if (m < M && n < given.N) y[size_t(m) * width + n] = from_float<T>(tile.total(sums, log_rows, p, at));
  }
}

template <typename Panels>
void wide_few(FewProduct<QuantMatrix> given, cudaStream_t stream) {
  using T = typename Panels::Element;
  constexpr auto kernel = wide_few_kernel<Panels>;
  static DeviceFlags allowed;
  allowed.once([&] { allow_shared(kernel, size_t(most_shared())); });
  const int log_rows = log_rows_of(given.M), sums_at = (int(FewRows<T>::staged_bytes(given.w.units() * kUnitChunks, log_rows)) + 15) / 16 * 16;
  const int ring_at = sums_at + WideTile<Panels>::sums_bytes(log_rows), bytes = ring_at + WideTile<Panels>::ring_bytes(Panels::unit_bytes(given.w));
  given.tiles = wide_tiles(given.N);
  const int tails = (given.tail_rows + WideTail<T>::kRows - 1) / WideTail<T>::kRows;
  launch(kernel, dim3(given.tiles + tails), dim3(kWideWarps * 32), size_t(bytes), stream, given, sums_at, ring_at);
}

}  // namespace qwen
