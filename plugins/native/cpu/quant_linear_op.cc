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

#include "operator.h"
#include "ops.h"
#include "quant_form.h"

namespace qwen {
namespace {

// About as much as stays in a core's second cache beside the activations of a few tiles.
constexpr size_t kGroupBytes = 48 << 10;
// Of a product in tile registers: a task has up to so many tiles, which its panels read again and again, and up to so many panels, fewer where
// that leaves few tasks.
constexpr int64_t kTilesOfTask = 16, kPanelsOfTask = 16, kTasks = 64;

QuantFormat format_of(const Attributes& info) {
  QuantFormat format;
  format.bits = int(info.integer("bits"));
  format.block = int(info.integer("block"));
  format.N = info.integer("N");
  format.K = info.integer("K");
  format.zeros = info.integer("zeros") != 0;
  format.wide_scales = info.integer("wide_scales") != 0;
  expect(format.bits == 4 || format.bits == 8, "a quantized matrix must have 4 or 8 bits");
  expect(format.block >= kQuantUnit && format.block <= kMostBlock && format.block % kQuantUnit == 0, "the block of a quantized matrix must be a multiple of 32, up to 256");
  expect(format.N > 0 && format.K > 0, "a quantized matrix must not be empty");
  return format;
}

const uint8_t* packed_input(const Call& call, size_t index, const QuantFormat& format) {
  const Shape shape = call.shape(index);
  expect(shape.size() == 2 && shape[1] == int64_t(format.panel_bytes()) && shape[0] >= format.panels(), "the packed matrix does not have the size of its format");
  return call.input<uint8_t>(index);
}

// All rows of a call, quantized, in tiles.
class Activations {
 public:
  Activations(const Call& call, const QuantFormat& format, const float* x, const float* norm, float epsilon, int64_t M) : form(format, M) {
    static const auto quantize = QWEN_BEST(quantize_tile);
    static thread_local ThreadMemory memory;
    const size_t scratch_bytes = (sizeof(float) * format.padded() + 63) / 64 * 64, tiles_bytes = size_t(form.count()) * form.tile_bytes();
    memory_ = memory.at_least(tiles_bytes + size_t(form.count()) * scratch_bytes);
    char* scratch = memory_ + tiles_bytes;
    call.parallel(size_t(form.count()), [&](size_t t) {
      quantize(format, x + int64_t(t) * form.tile_rows() * format.K, norm, epsilon, reinterpret_cast<float*>(scratch + t * scratch_bytes), tile(int64_t(t)));
    });
  }

  QuantTile tile(int64_t t) const { return form.tile(memory_, t); }

  const QuantForm form;

 private:
  char* memory_ = nullptr;
};

// Rows of results, and what is added to them. A result that comes from memory would hold up what is stored behind it.
struct Output {
  float* y;               // [M,N]
  const float* residual;  // [M,N] or null
  int64_t N;

  void fetch(int64_t panel, int64_t row, int rows) const {
    for (int64_t at = row * N + panel * kPanelRows, end = at + rows * N; at < end; at += N) {
      __builtin_prefetch(y + at, 1, 3);
      if (residual != nullptr) __builtin_prefetch(residual + at, 0, 3);
    }
  }
};

struct Result {
  alignas(64) float values[kTileSlots * kPanelRows];
};

// Each pair of a tile and of a panel at one place in every of SETS parts of the matrix, `panels` long: task(panel, tile, its first row, results).
// A group of panels stays in the cache while tiles go by.
template <int SETS, typename Task>
void over_panels(const Call& call, const Activations& activations, const uint8_t* packed, int64_t panels, const Output& output, const Task& task) {
  const QuantForm& form = activations.form;
  const int64_t tiles = form.count(), together = form.tiles() ? kTilesOfTask : tiles, parts = (tiles + together - 1) / together;
  const int64_t group = form.tiles() ? std::clamp<int64_t>(panels * parts / kTasks, 1, kPanelsOfTask)
                                     : std::max<int64_t>(1, int64_t(kGroupBytes / (SETS * Panels::bytes(form))));
  const auto stored = [&](int64_t panel, int set) { return packed + size_t(set * panels + panel) * form.format().panel_bytes(); };
  call.parallel(size_t((panels + group - 1) / group * parts), [&](size_t index) {
    const int64_t begin = int64_t(index) / parts * group, end = std::min(panels, begin + group);
    const int64_t first = int64_t(index) % parts * together, last = std::min(tiles, first + together);
    const Panels opened(form, SETS);
    const auto one = [&](int64_t panel, int64_t t) {
      const QuantTile tile = activations.tile(t);
      if (form.tiles()) output.fetch(panel, t * form.tile_rows(), tile.rows);
      Result results[SETS];
      for (int set = 0; set < SETS; set++) {
        // The next panel, of the next task too: one thread takes it, or one of a few.
        const Ahead ahead = opened.ahead(panel + 1 < panels ? stored(panel + 1, set) : nullptr, t - first, last - first);
        opened.product(stored(panel, set), set, tile, results[set].values, ahead);
      }
      task(panel, tile, t * form.tile_rows(), results);
    };
    if (form.streams()) {
      QuantTile all[kMostStreamed];
      for (int64_t t = 0; t < tiles; t++) all[t] = activations.tile(t);
      for (int64_t panel = begin; panel < end; panel++) {
        Result results[kMostStreamed][SETS];
        for (int64_t t = 0; t < tiles; t++) output.fetch(panel, t * form.tile_rows(), all[t].rows);
        for (int set = 0; set < SETS; set++)
          opened.stream(stored(panel, set), all, int(tiles), results[0][set].values, SETS * kTileSlots * kPanelRows);
        for (int64_t t = 0; t < tiles; t++) task(panel, all[t], t * form.tile_rows(), results[t]);
      }
    } else if (form.tiles()) {  // an open panel stays in the first cache
      for (int64_t panel = begin; panel < end; panel++) {
        for (int set = 0; set < SETS; set++) opened.open(stored(panel, set), set);
        for (int64_t t = first; t < last; t++) one(panel, t);
      }
    } else {
      for (int64_t t = first; t < last; t++)
        for (int64_t panel = begin; panel < end; panel++) one(panel, t);
    }
  });
}

class QuantLinearKernel {
 public:
  explicit QuantLinearKernel(const Attributes& info) : format_(format_of(info)), epsilon_(info.real("epsilon")) {}

  void compute(Call& call) {
    Shape shape = call.shape(0);
    expect(!shape.empty() && shape.back() == format_.K, "QuantLinear: x [...,K] and the packed matrix do not fit");
    const int64_t M = rows_of(shape), N = format_.N;
    const uint8_t* packed = packed_input(call, 1, format_);
    const float *x = call.input<float>(0), *residual = call.optional<float>(2), *norm = call.optional<float>(3);
    shape.back() = N;
    float* y = call.output<float>(0, shape);
    if (M == 0) return;
    const Activations activations(call, format_, x, norm, epsilon_, M);
    over_panels<1>(call, activations, packed, format_.panels(), {y, residual, N}, [&](int64_t panel, const QuantTile& tile, int64_t row, const Result* results) {
      const int64_t n = panel * kPanelRows, count = std::min<int64_t>(kPanelRows, N - n);
      for (int m = 0; m < tile.rows; m++) {
        const int64_t at = (row + m) * N + n;
        const float* values = results->values + m * kPanelRows;
        if (residual != nullptr && count == kPanelRows)
          for (int64_t i = 0; i < kPanelRows; i++) y[at + i] = values[i] + residual[at + i];
        else if (residual != nullptr)
          for (int64_t i = 0; i < count; i++) y[at + i] = values[i] + residual[at + i];
        else if (count == kPanelRows)
          std::memcpy(y + at, values, sizeof(float) * kPanelRows);
        else
          std::memcpy(y + at, values, sizeof(float) * size_t(count));
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
    over_panels<2>(call, activations, packed, panels, {y, nullptr, N}, [&](int64_t panel, const QuantTile& tile, int64_t row, Result* gate_up) {
      float* const gate = gate_up[0].values;
      swiglu(gate, gate_up[1].values, tile.rows * kPanelRows, gate);
      for (int m = 0; m < tile.rows; m++)
        std::memcpy(y + (row + m) * N + panel * kPanelRows, gate + m * kPanelRows, sizeof(float) * kPanelRows);
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
