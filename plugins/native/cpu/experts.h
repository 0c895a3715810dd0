// The matrices of all experts of a layer, w [E,N,K], in the forms that the Moe ops read: products of one expert with a few rows.
//
// Each form has
//   unit                          columns of a product are computed in multiples of it
//   input_bytes(rows)             memory of so many rows of activations in the order of the kernels
//   prepare(rows, count, input)   brings them into it
//   swiglu(e, input, ...)         columns first..last-1 of silu(x gate^T) * (x up^T), where w has N/2 gate rows, then N/2 up rows
//   product(e, input, ...)        columns first..last-1 of x w^T into out [rows, last - first]
// The result of a row does not depend on the other rows.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "product.h"
#include "quant_form.h"

namespace qwen {

inline size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// fp32 or bf16 values in the checkpoint's order.
struct PlainExperts {
  static constexpr size_t unit = 4;
  const void* w;
  bool bf16;
  size_t N, K;

  size_t input_bytes(size_t rows) const {
    static const auto size = QWEN_BEST(packed_size);
    return aligned(size(rows, K) * sizeof(float));
  }

  void prepare(const float* const* rows, size_t count, void* input) const {
    static const auto pack = QWEN_BEST(pack_rows);
    static const auto groups = QWEN_BEST(packed_groups);
    static thread_local std::vector<float> gathered;
    const float* x = rows[0];
    if (count > 1) {
      gathered.resize(count * K);
      for (size_t i = 0; i < count; i++) std::memcpy(gathered.data() + i * K, rows[i], K * sizeof(float));
      x = gathered.data();
    }
    pack(x, nullptr, 0, count, K, 0, groups(count), static_cast<float*>(input));
  }

  void swiglu(size_t e, const void* input, size_t rows, size_t first, size_t last, float* out) const {
    static const auto run = QWEN_BEST(product);
    run({static_cast<const float*>(input), at(e, 0), bf16, true, nullptr, out, rows, N / 2, K}, first, last);
  }

  void product(size_t e, const void* input, size_t rows, size_t first, size_t last, float* out) const {
    static const auto run = QWEN_BEST(product);
    run({static_cast<const float*>(input), at(e, first), bf16, false, nullptr, out, rows, last - first, K}, 0, last - first);
  }

  size_t row_bytes() const { return K * (bf16 ? 2 : 4); }

 private:
  const void* at(size_t e, size_t row) const { return static_cast<const char*>(w) + (e * N + row) * row_bytes(); }
};

// int4 or int8 in panels (quant.h), expert after expert: u8 [E, panels, bytes of a panel].
struct QuantExperts {
  static constexpr size_t unit = kPanelRows;
  const uint8_t* w;
  QuantFormat format;  // of the matrix of one expert

  size_t input_bytes(size_t rows) const {
    const QuantForm form(format, int64_t(rows));
    return size_t(form.count()) * form.tile_bytes();
  }

  void prepare(const float* const* rows, size_t count, void* input) const {
    static const auto quantize = QWEN_BEST(quantize_tile);
    static thread_local std::vector<float> gathered, scratch;
    const QuantForm form(format, int64_t(count));
    const size_t K = size_t(format.K), most = size_t(form.tile_rows());
    gathered.resize(most * K);
    scratch.resize(size_t(format.padded()));
    for (size_t start = 0; start < count; start += most) {
      const size_t here = std::min(most, count - start);
      for (size_t i = 0; i < here; i++) std::memcpy(gathered.data() + i * K, rows[start + i], K * sizeof(float));
      quantize(format, gathered.data(), nullptr, 0, scratch.data(), form.tile(input, int64_t(start / most)));
    }
  }

  void swiglu(size_t e, const void* input, size_t rows, size_t first, size_t last, float* out) const {
    static const auto activate = QWEN_BEST(quant_swiglu);
    const size_t columns = size_t(format.N) / 2;
    over_panels<2>(e, input, rows, first, last, columns, [&](size_t row, size_t n, int count, float* gate, float* up) {
      activate(gate, up, count * kPanelRows, gate);
      for (int i = 0; i < count; i++) std::memcpy(out + (row + size_t(i)) * columns + n, gate + i * kPanelRows, unit * sizeof(float));
    });
  }

  void product(size_t e, const void* input, size_t rows, size_t first, size_t last, float* out) const {
    over_panels<1>(e, input, rows, first, last, 0, [&](size_t row, size_t n, int count, float* values, float*) {
      const size_t width = std::min(unit, last - n);
      for (int i = 0; i < count; i++)
        std::memcpy(out + (row + size_t(i)) * (last - first) + (n - first), values + i * kPanelRows, width * sizeof(float));
    });
  }

  size_t row_bytes() const { return format.panel_bytes() / kPanelRows; }

 private:
  // task(row, n, rows, results of columns n .. n + 15, and of n + between ..) for each tile and panel.
  template <int SETS, typename Task>
  void over_panels(size_t e, const void* input, size_t rows, size_t first, size_t last, size_t between, const Task& task) const {
    const QuantForm form(format, int64_t(rows));
    const Panels panels(form, int64_t(SETS * ((last - first + unit - 1) / unit)));
    const auto place = [&](size_t n, size_t set) { return int64_t((n - first) / unit * SETS + set); };
    for (size_t n = first; n < last; n += unit)
      for (size_t set = 0; set < SETS; set++) panels.open(at(e, n + set * between), place(n, set));
    for (int64_t t = 0; t < form.count(); t++) {
      const QuantTile x = form.tile(const_cast<void*>(input), t);
      for (size_t n = first; n < last; n += unit) {
        alignas(64) float results[SETS][kTileSlots * kPanelRows];
        for (size_t set = 0; set < SETS; set++) panels.product(at(e, n + set * between), place(n, set), x, results[set]);
        task(size_t(t * form.tile_rows()), n, x.rows, results[0], results[SETS - 1]);
      }
    }
  }

  const uint8_t* at(size_t e, size_t row) const {
    return w + (e * size_t(format.panels()) + row / unit) * format.panel_bytes();
  }
};

}  // namespace qwen
