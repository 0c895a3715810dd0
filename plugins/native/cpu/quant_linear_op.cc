// Products with quantized matrices (quant.h). `packed` is u8[panels, bytes of a panel]; it may have more rows than N, of which the first N count.
// Attributes: bits (4, 8), block, N, K, zeros and wide_scales (0, 1), epsilon.
//
// QuantLinear  x f32[...,K], packed, residual f32[...,N]?, norm f32[K]? -> y f32[...,N]
//              y = rms_norm(x) w^T + residual
// QuantSwiGlu  x f32[...,K], packed of w [2N,K] (gate rows, then up rows; N a multiple of 16), norm f32[K]? -> y f32[...,N]
//              y = silu(rms_norm(x) gate^T) * (rms_norm(x) up^T); the attribute N counts rows of w
// QuantGather  ids i64[...], packed -> y f32[...,K]

#include <algorithm>
#include <cstring>
#include <memory>

#include "operator.h"
#include "ops.h"
#include "quant.h"

namespace qwen {
namespace {

// About as much as stays in a core's second cache beside the activations of a few tiles.
constexpr size_t kGroupBytes = 48 << 10;

QuantFormat format_of(const Attributes& info) {
  QuantFormat format;
  format.bits = int(info.integer("bits"));
  format.block = int(info.integer("block"));
  format.N = info.integer("N");
  format.K = info.integer("K");
  format.zeros = info.integer("zeros") != 0;
  format.wide_scales = info.integer("wide_scales") != 0;
  expect(format.bits == 4 || format.bits == 8, "a quantized matrix must have 4 or 8 bits");
  expect(format.block >= kQuantUnit && format.block <= 256 && format.block % kQuantUnit == 0, "the block of a quantized matrix must be a multiple of 32, up to 256");
  expect(format.N > 0 && format.K > 0, "a quantized matrix must not be empty");
  return format;
}

const uint8_t* packed_input(const Call& call, size_t index, const QuantFormat& format) {
  const Shape shape = call.shape(index);
  expect(shape.size() == 2 && shape[1] == int64_t(format.panel_bytes()) && shape[0] >= format.panels(), "the packed matrix does not have the size of its format");
  return call.input<uint8_t>(index);
}

// Memory of one thread that calls session.Run, kept from call to call: the allocator would return it to the system each time.
char* workspace(size_t bytes) {
  struct Block {
    std::unique_ptr<char[]> memory;
    size_t size = 0;
  };
  static thread_local Block block;
  if (block.size < bytes + 64) {
    block.memory.reset();
    block.memory.reset(new char[bytes + 64]);
    block.size = bytes + 64;
  }
  const auto address = reinterpret_cast<uintptr_t>(block.memory.get());
  return block.memory.get() + (64 - address % 64) % 64;
}

// All rows of a call, quantized, in tiles of up to 8.
class Activations {
 public:
  Activations(const Call& call, const QuantFormat& format, const float* x, const float* norm, float epsilon, int64_t M) : format_(format), M_(M) {
    static const auto quantize = QWEN_BEST(quantize_tile);
    tile_bytes_ = (QuantTile::bytes(format, tile_rows()) + 63) / 64 * 64;
    const size_t scratch_bytes = (sizeof(float) * format.padded() + 63) / 64 * 64;
    memory_ = workspace(size_t(tiles()) * (tile_bytes_ + scratch_bytes));
    char* scratch = memory_ + size_t(tiles()) * tile_bytes_;
    call.parallel(size_t(tiles()), [&](size_t t) {
      quantize(format, x + int64_t(t) * tile_rows() * format.K, norm, epsilon, reinterpret_cast<float*>(scratch + t * scratch_bytes), tile(int64_t(t)));
    });
  }

  static int64_t tile_rows() {
    static const int rows = QWEN_BEST(quant_tile_rows)();
    return rows;
  }
  int64_t tiles() const { return (M_ + tile_rows() - 1) / tile_rows(); }
  QuantTile tile(int64_t t) const {
    return QuantTile::at(memory_ + size_t(t) * tile_bytes_, format_, int(std::min(tile_rows(), M_ - t * tile_rows())));
  }

 private:
  const QuantFormat& format_;
  int64_t M_;
  size_t tile_bytes_ = 0;
  char* memory_ = nullptr;
};

// task(panel, tile, index of the tile) for every pair; a group of panels stays in the cache while the tiles go by.
template <typename Task>
void over_panels(const Call& call, const Activations& activations, int64_t panels, size_t panel_bytes, const Task& task) {
  const int64_t group = std::max<int64_t>(1, int64_t(kGroupBytes / panel_bytes));
  call.parallel(size_t((panels + group - 1) / group), [&](size_t index) {
    const int64_t begin = int64_t(index) * group, end = std::min(panels, begin + group);
    for (int64_t t = 0; t < activations.tiles(); t++) {
      const QuantTile tile = activations.tile(t);
      for (int64_t panel = begin; panel < end; panel++) task(panel, tile, t);
    }
  });
}

class QuantLinearKernel {
 public:
  explicit QuantLinearKernel(const Attributes& info) : format_(format_of(info)), epsilon_(info.real("epsilon")) {}

  void compute(Call& call) {
    static const auto product = QWEN_BEST(quant_panel);
    Shape shape = call.shape(0);
    expect(!shape.empty() && shape.back() == format_.K, "QuantLinear: x [...,K] and the packed matrix do not fit");
    const int64_t M = rows_of(shape), N = format_.N;
    const uint8_t* packed = packed_input(call, 1, format_);
    const float *x = call.input<float>(0), *residual = call.optional<float>(2), *norm = call.optional<float>(3);
    shape.back() = N;
    float* y = call.output<float>(0, shape);
    if (M == 0) return;
    const Activations activations(call, format_, x, norm, epsilon_, M);
    over_panels(call, activations, format_.panels(), format_.panel_bytes(), [&](int64_t panel, const QuantTile& tile, int64_t t) {
      alignas(64) float out[kMostTileRows * kPanelRows];
      product(format_, packed + size_t(panel) * format_.panel_bytes(), tile, out);
      const int64_t n = panel * kPanelRows, count = std::min<int64_t>(kPanelRows, N - n);
      for (int m = 0; m < tile.rows; m++) {
        const int64_t at = (t * Activations::tile_rows() + m) * N + n;
        const float* row = out + m * kPanelRows;
        if (residual != nullptr)
          for (int64_t i = 0; i < count; i++) y[at + i] = row[i] + residual[at + i];
        else
          std::memcpy(y + at, row, sizeof(float) * size_t(count));
      }
    });
  }

 private:
  QuantFormat format_;
  float epsilon_;
};

class QuantSwiGluKernel {
 public:
  explicit QuantSwiGluKernel(const Attributes& info) : format_(format_of(info)), epsilon_(info.real("epsilon")) {
    expect(format_.N % (2 * kPanelRows) == 0, "QuantSwiGlu: gate and up must each have a multiple of 16 rows");
  }

  void compute(Call& call) {
    static const auto product = QWEN_BEST(quant_panel);
    static const auto swiglu = QWEN_BEST(quant_swiglu);
    Shape shape = call.shape(0);
    expect(!shape.empty() && shape.back() == format_.K, "QuantSwiGlu: x [...,K] and the packed matrix do not fit");
    const int64_t M = rows_of(shape), N = format_.N / 2, panels = N / kPanelRows;
    const uint8_t* packed = packed_input(call, 1, format_);
    const float *x = call.input<float>(0), *norm = call.optional<float>(2);
    shape.back() = N;
    float* y = call.output<float>(0, shape);
    if (M == 0) return;
    const Activations activations(call, format_, x, norm, epsilon_, M);
    over_panels(call, activations, panels, 2 * format_.panel_bytes(), [&](int64_t panel, const QuantTile& tile, int64_t t) {
      alignas(64) float gate[kMostTileRows * kPanelRows], up[kMostTileRows * kPanelRows];
      product(format_, packed + size_t(panel) * format_.panel_bytes(), tile, gate);
      product(format_, packed + size_t(panels + panel) * format_.panel_bytes(), tile, up);
      swiglu(gate, up, tile.rows * kPanelRows, gate);
      for (int m = 0; m < tile.rows; m++)
        std::memcpy(y + (t * Activations::tile_rows() + m) * N + panel * kPanelRows, gate + m * kPanelRows, sizeof(float) * kPanelRows);
    });
  }

 private:
  QuantFormat format_;
  float epsilon_;
};

class QuantGatherKernel {
 public:
  explicit QuantGatherKernel(const Attributes& info) : format_(format_of(info)) {}

  void compute(Call& call) {
    static const auto row = QWEN_BEST(quant_row);
    Shape shape = call.shape(0);
    const int64_t* ids = call.input<int64_t>(0);
    const uint8_t* packed = packed_input(call, 1, format_);
    shape.push_back(format_.K);
    const int64_t count = rows_of(shape);
    for (int64_t i = 0; i < count; i++) expect(ids[i] >= 0 && ids[i] < format_.N, "QuantGather: an id is outside the embedding");
    float* y = call.output<float>(0, shape);
    for (int64_t i = 0; i < count; i++) row(format_, packed, ids[i], y + i * format_.K);
  }

 private:
  QuantFormat format_;
};

}  // namespace

void add_quantized(Domain& domain) {
  static const Operator<QuantLinearKernel> linear({"QuantLinear", "fbf?f?", "f"});
  static const Operator<QuantSwiGluKernel> swiglu({"QuantSwiGlu", "fbf?", "f"});
  static const Operator<QuantGatherKernel> gather({"QuantGather", "lb", "f"});
  domain.add(linear);
  domain.add(swiglu);
  domain.add(gather);
}

}  // namespace qwen
