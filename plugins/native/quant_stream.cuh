// The inner loop of all products with quantized matrices: one warp multiplies parts of panels of 16 weight rows with up to 8 rows of activations.
//
// The tensor cores do the arithmetic. A panel's 16 rows are the A operand of m16n8k16, activation rows the 8 columns of B. A product may visit
// k in any order, so each lane takes 8 neighboring k of two neighboring weight rows, which are stored in 8 bytes, and the same 8 k of one
// activation row. Codes minus zeros are integers that fp16 and bf16 hold exactly; the sum over 32 k is multiplied by the block's scale in fp32.
//
// The warps of a block take units of 128 k in turn. A warp copies its next units to shared memory while it computes; no other warp waits for
// it. The order of the sum depends on K and the number of warps only, so a row has the same bits beside any other rows.
#pragma once

#include "mma.cuh"
#include "panels.cuh"
#include "quant.cuh"

namespace qwen {

// Two integers code - zero as a pair of T. `word` has the pair of codes in bits 0..3 and 16..19 (4 bits), or in bytes 0 and 1 (8 bits).
template <typename T, int BITS>
struct Pair;
template <int BITS>
struct Pair<__half, BITS> {  // 1024 + code is 0x6400 | code
  __device__ static uint32_t zero(uint32_t z) { return (0x6400u | z) * 0x10001u; }
  __device__ static uint32_t of(uint32_t word, uint32_t zero) {
    const uint32_t biased = BITS == 4 ? (word & 0x000F000Fu) | 0x64006400u : __byte_perm(word, 0x64646464u, 0x4140);
    const __half2 pair = __hsub2(*reinterpret_cast<const __half2*>(&biased), *reinterpret_cast<const __half2*>(&zero));
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};
template <>
struct Pair<__nv_bfloat16, 4> {  // 128 + code is 0x4300 | code
  __device__ static uint32_t zero(uint32_t z) { return (0x4300u | z) * 0x10001u; }
  __device__ static uint32_t of(uint32_t word, uint32_t zero) {
    const uint32_t biased = (word & 0x000F000Fu) | 0x43004300u;
    const __nv_bfloat162 pair = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&biased), *reinterpret_cast<const __nv_bfloat162*>(&zero));
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};
template <>
struct Pair<__nv_bfloat16, 8> {  // 2^23 + code is 0x4B000000 | code, in fp32: bf16 does not hold 128 + code
  __device__ static uint32_t zero(uint32_t z) { return 0x4B000000u | z; }
  __device__ static uint32_t of(uint32_t word, uint32_t zero) {
    const float bias = __uint_as_float(zero);
    const float low = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440)) - bias;
    const float high = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7441)) - bias;
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

// The places of units, and their parts of a group of blocks.
struct UnitLayout {
  int log_block, codes_at, zeros_at, group_bytes, padded, units;
  bool zeros, wide;

  __device__ explicit UnitLayout(const QuantMatrix& w)
      : log_block(w.block == 32 ? 5 : w.block == 64 ? 6 : 7),
        codes_at(w.codes_at()),
        zeros_at(w.zeros_at()),
        group_bytes(w.group_bytes()),
        padded(w.padded()),
        units((padded + kUnit - 1) / kUnit),
        zeros(w.zeros),
        wide(w.wide_scales) {}
};

template <int BITS>
struct UnitBuffer {
  static constexpr int kCodes = kUnit * kPanelRows * BITS / 8, kScales = kGroupBlocks * kPanelRows * 4, kZeros = kGroupBlocks * kPanelRows;
  uint8_t codes[kCodes];
  uint8_t scales[kScales];
  uint8_t zeros[kZeros];
};

template <typename T, int BITS, int PANELS>
struct QuantStream {
  using Matrix = QuantMatrix;
  static constexpr int kPanels = PANELS, kRegisters = PANELS == 1 ? 64 : 80;  // two blocks of 16 warps on a multiprocessor, or three of 8
  static constexpr int kStages = BITS == 4 ? 3 : 2;
  using Buffer = UnitBuffer<BITS>;
  static constexpr size_t kBytesPerWarp = sizeof(Buffer) * PANELS * kStages;

  const UnitLayout layout;
  Buffer* const ring;  // of this warp, [kStages][PANELS]
  const int lane, g, t;

  __device__ QuantStream(const QuantMatrix& w, void* shared, int warp)
      : layout(w),
        ring(reinterpret_cast<Buffer*>(static_cast<char*>(shared) + warp * kBytesPerWarp)),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4) {}

  __device__ int units() const { return layout.units; }

  // Start copying unit `unit` of a panel.
  __device__ void fetch(const uint8_t* panel, int unit, Buffer& into) const {
    const int first = unit * kUnit, block = first >> layout.log_block, group = block / kGroupBlocks, inside = block % kGroupBlocks;
    const int blocks = kUnit >> layout.log_block, size = layout.wide ? 4 : 2;
    const uint8_t* at = panel + size_t(group) * layout.group_bytes;
    const uint8_t* codes = at + layout.codes_at + (first - (group * kGroupBlocks << layout.log_block)) * (kPanelRows * BITS / 8);
    const int pieces = min(kUnit, layout.padded - first) * BITS / 8;
#pragma unroll
    for (int i = 0; i < Buffer::kCodes / 512; i++) {
      const int piece = i * 32 + lane;
      if (piece < pieces) copy16(into.codes + piece * 16, codes + piece * 16);
    }
    if (lane < blocks * size) copy16(into.scales + lane * 16, at + inside * kPanelRows * size + lane * 16);
    if (layout.zeros && lane >= 16 && lane - 16 < blocks)
      copy16(into.zeros + (lane - 16) * 16, at + layout.zeros_at + (inside + lane - 16) * 16);
  }

  // panels(u, p) is the panel p and unit(u) the unit of the warp's u-th piece of work, for u below `count`. Before run.
  template <typename Panel, typename Unit>
  __device__ void start(const Panel& panel, const Unit& unit, int count) const {
#pragma unroll
    for (int stage = 0; stage < kStages - 1; stage++) {
      if (stage < count) {
#pragma unroll
        for (int p = 0; p < PANELS; p++) fetch(panel(stage, p), unit(stage), ring[stage * PANELS + p]);
      }
      end_copies();
    }
  }

  // sum[p] += the product of panel p with the activations. activations(u, k) are 8 values from k of this lane's row of activations (g), zeros
  // where there are none; factor(u) multiplies all of a piece.
  // sum[p][0], [1]: row 2g of the panel with activation rows 2t, 2t+1; [2], [3]: row 2g+1.
  template <typename Panel, typename Unit, typename Activations, typename Factor>
  __device__ void run(const Panel& panel, const Unit& unit, int count, const Activations& activations, const Factor& factor, float (&sum)[PANELS][4]) const {
    int now = 0, next = kStages - 1;
    for (int u = 0; u < count; u++) {
      await_copies<kStages - 2>();
      __syncwarp();
      if (u + kStages - 1 < count) {
#pragma unroll
        for (int p = 0; p < PANELS; p++) fetch(panel(u + kStages - 1, p), unit(u + kStages - 1), ring[next * PANELS + p]);
      }
      end_copies();
      compute(unit(u), ring + now * PANELS, [&](int k) { return activations(u, k); }, factor(u), sum);
      now = now + 1 == kStages ? 0 : now + 1;
      next = next + 1 == kStages ? 0 : next + 1;
    }
    await_copies<0>();
  }

 private:
  template <typename Activations>
  __device__ void compute(int unit, const Buffer* buffers, const Activations& activations, float factor, float (&sum)[PANELS][4]) const {
    const int first = unit * kUnit;
    uint4 parts[kUnit / kStep];  // all on their way before the first is used
#pragma unroll
    for (int step = 0; step < kUnit / kStep; step++) parts[step] = activations(first + step * kStep + t * 8);
#pragma unroll
    for (int step = 0; step < kUnit / kStep; step++) {
      if (first + step * kStep >= layout.padded) break;
      const uint4 x = parts[step];
      const int block = step * kStep >> layout.log_block;
#pragma unroll
      for (int p = 0; p < PANELS; p++) {
        const Buffer& buffer = buffers[p];
        float2 scale;
        if (layout.wide)
          scale = *reinterpret_cast<const float2*>(buffer.scales + (block * kPanelRows + 2 * g) * 4);
        else
          scale = __half22float2(*reinterpret_cast<const __half2*>(buffer.scales + (block * kPanelRows + 2 * g) * 2));
        uint32_t zero0 = 1u << (BITS - 1), zero1 = zero0;
        if (layout.zeros) {
          const uchar2 both = *reinterpret_cast<const uchar2*>(buffer.zeros + block * kPanelRows + 2 * g);
          zero0 = both.x, zero1 = both.y;
        }
        zero0 = Pair<T, BITS>::zero(zero0), zero1 = Pair<T, BITS>::zero(zero1);
        const auto pair = [](uint32_t word, uint32_t zero) { return Pair<T, BITS>::of(word, zero); };
        float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if constexpr (BITS == 4) {
          // A word has k 0, 4, 1, 5, 2, 6, 3, 7 from its lowest bits: pairs (0,2), (4,6), (1,3), (5,7).
          const uint2 w = *reinterpret_cast<const uint2*>(buffer.codes + step * 256 + t * 64 + g * 8);
          multiply<T>(c, pair(w.x, zero0), pair(w.y, zero1), pair(w.x >> 4, zero0), pair(w.y >> 4, zero1), __byte_perm(x.x, x.y, 0x5410),
                      __byte_perm(x.z, x.w, 0x5410));
          multiply<T>(c, pair(w.x >> 8, zero0), pair(w.y >> 8, zero1), pair(w.x >> 12, zero0), pair(w.y >> 12, zero1),
                      __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632));
        } else {
          const uint2 v = *reinterpret_cast<const uint2*>(buffer.codes + step * 512 + t * 128 + g * 8);
          const uint2 w = *reinterpret_cast<const uint2*>(buffer.codes + step * 512 + t * 128 + 64 + g * 8);
          multiply<T>(c, pair(v.x, zero0), pair(v.y, zero1), pair(v.x >> 16, zero0), pair(v.y >> 16, zero1), x.x, x.y);
          multiply<T>(c, pair(w.x, zero0), pair(w.y, zero1), pair(w.x >> 16, zero0), pair(w.y >> 16, zero1), x.z, x.w);
        }
        scale.x *= factor, scale.y *= factor;
        sum[p][0] += c[0] * scale.x, sum[p][1] += c[1] * scale.x;
        sum[p][2] += c[2] * scale.y, sum[p][3] += c[3] * scale.y;
      }
    }
  }
};

template <typename T, int PANELS>
using Int4Stream = QuantStream<T, 4, PANELS>;
template <typename T, int PANELS>
using Int8Stream = QuantStream<T, 8, PANELS>;

}  // namespace qwen
