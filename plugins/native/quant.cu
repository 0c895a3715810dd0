#include "quant.cuh"

#include "product_few.cuh"
#include "quant_panels.cuh"
#include "quant_stream.cuh"
#include "resident_few.cuh"
#include "tiles_few.cuh"

namespace qwen {
namespace {

// Eight neighboring values of a row, from k on (a multiple of 8).
template <typename T>
__device__ uint4 eight(const QuantMatrix& w, int row, int k) {
  const uint8_t* panel = w.packed + size_t(row / kPanelRows) * w.panel_bytes();
  const int r = row % kPanelRows, block = k / w.block, inside = block % kGroupBlocks;
  const uint8_t* group = panel + size_t(block / kGroupBlocks) * w.group_bytes();
  const int at = inside * kPanelRows + r;
  const float scale = w.wide_scales ? reinterpret_cast<const float*>(group)[at] : __half2float(reinterpret_cast<const __half*>(group)[at]);
  const int zero = w.zeros ? group[w.zeros_at() + at] : 1 << (w.bits - 1);
  const uint8_t* codes = group + w.codes_at() + inside * w.block_bytes() + (k % w.block) * (kPanelRows * w.bits / 8);
  Pack8<T> values;
  if (w.bits == 4) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(codes + r * 4);
#pragma unroll
    for (int i = 0; i < 8; i++) values.item[i] = from_float<T>(scale * float(int(word >> (i % 4 * 8 + i / 4 * 4) & 15) - zero));
  } else {
    const uint32_t low = *reinterpret_cast<const uint32_t*>(codes + r * 4), high = *reinterpret_cast<const uint32_t*>(codes + 64 + r * 4);
#pragma unroll
    for (int i = 0; i < 8; i++) values.item[i] = from_float<T>(scale * float(int((i < 4 ? low : high) >> (i % 4 * 8) & 255) - zero));
  }
  return values.bits;
}

// Neighboring threads take neighboring rows of a panel, whose codes are stored together, four of them 8 k further.
template <typename T>
__global__ void dequantize_kernel(QuantMatrix w, int first_row, int rows, T* out) {
  wait_for_previous();
  let_next_start();
  const int row = blockIdx.y * kPanelRows + threadIdx.x % kPanelRows, k = (blockIdx.x * (blockDim.x / kPanelRows) + threadIdx.x / kPanelRows) * 8;
  if (row < rows && k < w.K) *reinterpret_cast<uint4*>(out + size_t(row) * w.K + k) = eight<T>(w, first_row + row, k);
}

template <typename T>
__global__ void gather_kernel(QuantMatrix w, const int64_t* ids, T* y) {
  wait_for_previous();
  let_next_start();
  const int64_t id = ids[blockIdx.x];
  for (int k = threadIdx.x * 8; k < w.K; k += blockDim.x * 8)
    *reinterpret_cast<uint4*>(y + size_t(blockIdx.x) * w.K + k) = id >= 0 && id < w.N ? eight<T>(w, int(id), k) : make_uint4(0, 0, 0, 0);
}

// The usual matrices, where tiles are better. By measurements of steps of 0.8B and 35B-A3B on an H200.
template <typename T, bool SWIGLU>
bool usual_few_rows(const FewProduct<QuantMatrix>& given, cudaStream_t stream) {
  if (!std::is_same<T, __half>::value || !Int4Panels<__half, 0>::takes(given.w)) return false;
  const auto run = [&](auto shape) {
    with_int4_panels<__half>(given.M, [&](auto* panels) { tiles_few<std::remove_pointer_t<decltype(panels)>, decltype(shape)>(given, stream); });
    return true;
  };
  if constexpr (SWIGLU) {
    if (tiles_fit<GatedTiles>(given, 2)) return run(GatedTiles{});
  } else if (given.residual == nullptr && given.N >= given.w.K) {
    if (tiles_fit<WideTiles>(given, 2)) return run(WideTiles{});
    if (tiles_fit<WidestTiles>(given, 2)) return run(WidestTiles{});
  } else if (narrow_tiles_are_better(given)) {
    return run(NarrowTiles{});
  }
  return false;
}

template <typename T, bool SWIGLU>
void few_rows(const FewProduct<QuantMatrix>& given, cudaStream_t stream) {
  const auto& w = given.w;
  if (usual_few_rows<T, SWIGLU>(given, stream)) return;
  if (!SWIGLU && !resident_is_better<QuantPanels<T, 4, false>>(given.N, w.K)) {
    if (wide_tiles_are_better(given)) return tiles_few<QuantPanels<T, 4, true>, WidestTiles>(given, stream);
    if (narrow_tiles_are_better(given)) return tiles_few<QuantPanels<T, 4, true>, NarrowTiles>(given, stream);
  }
  if (!resident_is_better<QuantPanels<T, 4, false>>(given.N, w.K))
    w.bits == 4 ? product_few<T, Int4Stream, SWIGLU>(given, stream) : product_few<T, Int8Stream, SWIGLU>(given, stream);
  else if (w.zeros || w.wide_scales)
    w.bits == 4 ? resident_few<QuantPanels<T, 4, true>>(given, SWIGLU, stream) : resident_few<QuantPanels<T, 8, true>>(given, SWIGLU, stream);
  else
    w.bits == 4 ? resident_few<QuantPanels<T, 4, false>>(given, SWIGLU, stream) : resident_few<QuantPanels<T, 8, false>>(given, SWIGLU, stream);
}

}  // namespace

template <typename T>
void quant_linear(const QuantMatrix& w, const T* x, const T* tail, int tail_rows, const T* residual, const T* norm, float eps, T* y, int M, cudaStream_t stream,
                  T* normed) {
  const FewProduct<QuantMatrix> given{w, x, tail, residual, norm, y, eps, M, w.N, tail_rows, 0, 0, normed};
  few_rows<T, false>(given, stream);
}

template <typename T>
void quant_swiglu(const QuantMatrix& w, const T* x, const T* norm, float eps, T* y, int M, cudaStream_t stream, T* normed) {
  const FewProduct<QuantMatrix> given{w, x, nullptr, nullptr, norm, y, eps, M, w.N / 2, 0, 0, 0, normed};
  few_rows<T, true>(given, stream);
}

template <typename T>
void dequantize(const QuantMatrix& w, int first_panel, int rows, T* out, cudaStream_t stream) {
  const int threads = 256, columns = threads / kPanelRows * 8;
  launch(dequantize_kernel<T>, dim3((w.K + columns - 1) / columns, (rows + kPanelRows - 1) / kPanelRows), dim3(threads), 0, stream, w,
         first_panel * kPanelRows, rows, out);
}

template <typename T>
void quant_gather(const QuantMatrix& w, const int64_t* ids, T* y, int count, cudaStream_t stream) {
  launch(gather_kernel<T>, dim3(count), dim3(128), 0, stream, w, ids, y);
}

#define INSTANTIATE(T)                                                                                                                \
  template void quant_linear<T>(const QuantMatrix&, const T*, const T*, int, const T*, const T*, float, T*, int, cudaStream_t, T*);       \
  template void quant_swiglu<T>(const QuantMatrix&, const T*, const T*, float, T*, int, cudaStream_t, T*);                                \
  template void dequantize<T>(const QuantMatrix&, int, int, T*, cudaStream_t);                                                        \
  template void quant_gather<T>(const QuantMatrix&, const int64_t*, T*, int, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
