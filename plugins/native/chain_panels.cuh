// The weights of a chain: how a stage of the ring is fetched, and how a warp multiplies its unit of it. A stage is one unit of a panel for each warp.
#pragma once

#include <type_traits>

#include "chain_step.cuh"
#include "chain_words.cuh"
#include "few_rows.cuh"
#include "mma.cuh"
#include "plain_panels.cuh"
#include "quant.cuh"
#include "quant_fragments.cuh"

namespace qwen {

constexpr int kPitch = 32;  // bytes more than the units of a row, so that rows which are read together lie in different banks

// A chunk of 8 activations of row m: rows of a chunk are neighbors, exchanged so that reads along rows and writes along k find different banks.
template <int LOG_ROWS>
__device__ inline int chunk_at(int m, int chunk) {
  return ((chunk << LOG_ROWS) + (m ^ (chunk & ((1 << LOG_ROWS) - 1)))) * int(sizeof(uint4));
}

// The chunk of this lane's row (g) for a product. Lanes without a row make columns that nobody reads: they load nothing, and keep what they have.
template <int LOG_ROWS>
__device__ inline void load_chunk(const uint8_t* staged, int chunk, uint4& x) {
  const int g = threadIdx.x % 32 / 4;
  asm volatile("{.reg .pred p; setp.lt.s32 p,%5,%6; @p ld.shared.v4.u32 {%0,%1,%2,%3},[%4];}"
               : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
               : "r"(shared_of(staged + chunk_at<LOG_ROWS>(g, chunk))), "r"(g), "n"(1 << LOG_ROWS));
}

// A stage of a matrix in rows: `count` units from `unit` of `panel` on, which may go on in the next panels. Each lane copies a piece of a row.
template <int UNIT_BYTES>
__device__ inline void fetch_rows(const uint8_t* w, int64_t row_bytes, int units, int panel, int unit, int count, int up_rows, uint32_t into,
                                  uint32_t barrier) {
  constexpr int kRow = kChainWarps * UNIT_BYTES + kPitch;
  const int lane = threadIdx.x % 32, r = lane % kPanelRows;
  if (lane == 0) barrier_expect(barrier, count * kPanelRows * UNIT_BYTES);
  __syncwarp();
  for (int done = 0, which = 0; done < count; which++) {
    const int here = min(units - unit, count - done);
    if (lane / kPanelRows == which % 2) {
      const int first = up_rows ? (panel >> 1) * kPanelRows + (panel & 1) * up_rows : panel * kPanelRows;
      copy_bulk(into + r * kRow + done * UNIT_BYTES, w + (first + r) * row_bytes + unit * UNIT_BYTES, here * UNIT_BYTES, barrier);
    }
    done += here, unit = 0, panel++;
  }
}

template <typename T>
struct ChainPlain {
  using Element = T;
  static constexpr int kUnitK = 64, kUnitBytes = kUnitK * int(sizeof(T)), kRow = kChainWarps * kUnitBytes + kPitch, kStage = kPanelRows * kRow;
  using Matrix = PlainMatrix<T, kUnitK>;
  static constexpr int kChunks = kUnitK / kStep;  // of activations that a lane has of a unit

  struct Source {
    const uint8_t* at;
    int row_bytes, units, up_rows;
    __device__ void open(const ChainStep<ChainPlain>& step) {
      at = reinterpret_cast<const uint8_t*>(step.w.rows), row_bytes = step.K * int(sizeof(T)), units = step.K / kUnitK, up_rows = step.up_rows;
    }
    __device__ void fetch(int panel, int unit, int count, uint32_t into, uint32_t barrier) const {
      fetch_rows<kUnitBytes>(at, row_bytes, units, panel, unit, count, up_rows, into, barrier);
    }
  };

  // A chunk of the activations.
  template <int LOG_ROWS>
  __device__ static void put(uint8_t* staged, float*, int m, int column, Pack8<T> value, bool there) {
    if (there) *reinterpret_cast<uint4*>(staged + chunk_at<LOG_ROWS>(m, column / kChunk)) = value.bits;
  }
  static int zero_bytes(int, int) { return 0; }

  template <int LOG_ROWS>
  __device__ static void multiply(const uint8_t* stage, int unit, const uint8_t* staged, const float*, bool, uint4 (&x)[kChunks], float (&sum)[4]) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint8_t* at = stage + 2 * g * kRow + warp * kUnitBytes + t * 16;
#pragma unroll
    for (int step = 0; step < kUnitK / kStep; step++) {
      load_chunk<LOG_ROWS>(staged, unit * (kUnitK / kChunk) + step * 4 + t, x[step]);
      const uint4 a = *reinterpret_cast<const uint4*>(at + step * 64);
      const uint4 d = *reinterpret_cast<const uint4*>(at + kRow + step * 64);
      qwen::multiply<T>(sum, a.x, d.x, a.y, d.y, x[step].x, x[step].y);
      qwen::multiply<T>(sum, a.z, d.z, a.w, d.w, x[step].z, x[step].w);
    }
  }
};

// 4 bits, blocks of 32, scales in fp16, no zeros: a unit is a group of blocks with its scales (quant.cuh). Codes become numbers by a bias of the
// exponent, and what the bias adds to a block's sum is taken off before: 1024 + code and 64 + code in fp16, 128 + code in bf16.
template <typename T>
struct ChainInt4 {
  using Element = T;
  using Matrix = QuantMatrix;
  static constexpr int kBlock = 32, kUnitK = kGroupBlocks * kBlock, kScales = kGroupBlocks * kPanelRows * 2;
  static constexpr int kUnitBytes = kScales + kUnitK * kPanelRows / 2, kStage = kChainWarps * kUnitBytes;
  static constexpr int kChunks = kGroupBlocks;  // of activations that a lane has of a unit
  static constexpr int kTailK = 32, kTailRow = kChainWarps * kTailK * 2 + kPitch;
  static_assert(kTailRow * kPanelRows <= kStage);
  static constexpr bool kHalf = std::is_same<T, __half>::value;
  static constexpr float kLowZero = kHalf ? 1032.0f : 136.0f, kHighZero = kHalf ? 72.0f : 136.0f;

  struct Source {
    const uint8_t* at;
    int row_bytes, units, up_panels;
    bool tail;
    __device__ void open(const ChainStep<ChainInt4>& step) {
      tail = step.tail != nullptr;
      at = tail ? reinterpret_cast<const uint8_t*>(step.tail) : step.w.packed;
      units = step.K / (tail ? kTailK : kUnitK), row_bytes = step.K * 2, up_panels = step.up_rows / kPanelRows;
    }
    __device__ void fetch(int panel, int unit, int count, uint32_t into, uint32_t barrier) const {
      if (tail) return fetch_rows<kTailK * 2>(at, row_bytes, units, panel, unit, count, 0, into, barrier);
      if (threadIdx.x % 32 != 0) return;
      barrier_expect(barrier, count * kUnitBytes);
      if (up_panels == 0) return copy_bulk(into, at + (int64_t(panel) * units + unit) * kUnitBytes, count * kUnitBytes, barrier);
      for (int done = 0; done < count; panel++) {
        const int here = min(units - unit, count - done), own = (panel >> 1) + (panel & 1) * up_panels;
        copy_bulk(into + done * kUnitBytes, at + (int64_t(own) * units + unit) * kUnitBytes, here * kUnitBytes, barrier);
        done += here, unit = 0;
      }
    }
  };

  // Columns of a chunk lie as 0, 2, 4, 6, 1, 3, 5, 7: in the order of the codes in a word. What the bias makes of 32 columns goes to `zeros`.
  template <int LOG_ROWS>
  __device__ static void put(uint8_t* staged, float* zeros, int m, int column, Pack8<T> value, bool there) {
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunk / 2; i++) low += to_float(value.item[i]), high += to_float(value.item[kChunk / 2 + i]);
    float sum = low * -kLowZero + high * -kHighZero;
#pragma unroll
    for (int step = 1; step < kBlock / kChunk; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (!there) return;
    const uint4 bits = value.bits;
    *reinterpret_cast<uint4*>(staged + chunk_at<LOG_ROWS>(m, column / kChunk)) =
        make_uint4(even(bits.x, bits.y), even(bits.z, bits.w), odd(bits.x, bits.y), odd(bits.z, bits.w));
    if (column % kBlock == 0) {
      float* at = zeros + column / kBlock * kZeros<LOG_ROWS> + (m / 2 * 4 + m % 2);
      at[0] = at[2] = sum;
    }
  }
  // Of a block, for each pair of rows: both sums, twice, as they lie in a lane of the product.
  template <int LOG_ROWS>
  static constexpr int kZeros = LOG_ROWS ? 2 << LOG_ROWS : 4;
  static int zero_bytes(int K, int log_rows) { return K / kBlock * int(sizeof(float)) * (log_rows ? 2 << log_rows : 4); }

  template <int LOG_ROWS>
  __device__ static void multiply(const uint8_t* stage, int unit, const uint8_t* staged, const float* zeros, bool is_tail, uint4 (&x)[kChunks],
                                  float (&sum)[4]) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (is_tail) {
      const uint8_t* at = stage + 2 * g * kTailRow + warp * kTailK * 2 + t * 16;
      load_chunk<LOG_ROWS>(staged, unit * (kTailK / kChunk) + t, x[0]);
      const uint4 a = *reinterpret_cast<const uint4*>(at), d = *reinterpret_cast<const uint4*>(at + kTailRow);
      qwen::multiply<T>(sum, even(a.x, a.y), even(d.x, d.y), even(a.z, a.w), even(d.z, d.w), x[0].x, x[0].y);
      qwen::multiply<T>(sum, odd(a.x, a.y), odd(d.x, d.y), odd(a.z, a.w), odd(d.z, d.w), x[0].z, x[0].w);
      return;
    }
    const uint8_t* buffer = stage + warp * kUnitBytes;
#pragma unroll
    for (int step = 0; step < kGroupBlocks; step++) {
      load_chunk<LOG_ROWS>(staged, unit * (kUnitK / kChunk) + step * 4 + t, x[step]);
      const float4 zero = *reinterpret_cast<const float4*>(zeros + (unit * kGroupBlocks + step) * kZeros<LOG_ROWS> + (LOG_ROWS < 2 ? 0 : t % 2 * 4));
      const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(buffer + step * kPanelRows * 2 + g * 4));
      const uint2 w = *reinterpret_cast<const uint2*>(buffer + kScales + step * 256 + t * 64 + g * 8);
      const uint2 v = make_uint2(w.x >> 8, w.y >> 8);
      float c[4] = {zero.x, zero.y, zero.z, zero.w};
      qwen::multiply<T>(c, low(w.x), low(w.y), high(w.x), high(w.y), x[step].x, x[step].y);
      qwen::multiply<T>(c, low(v.x), low(v.y), high(v.x), high(v.y), x[step].z, x[step].w);
      sum[0] += c[0] * scale.x, sum[1] += c[1] * scale.x;
      sum[2] += c[2] * scale.y, sum[3] += c[3] * scale.y;
    }
  }

 private:
  __device__ static uint32_t even(uint32_t p, uint32_t q) { return __byte_perm(p, q, 0x5410); }
  __device__ static uint32_t odd(uint32_t p, uint32_t q) { return __byte_perm(p, q, 0x7632); }
  __device__ static uint32_t low(uint32_t word) { return masked(word, 0x000F000Fu, kHalf ? 0x64006400u : 0x43004300u); }
  __device__ static uint32_t high(uint32_t word) { return kHalf ? masked(word, 0x00F000F0u, 0x54005400u) : low(word >> 4); }
};

}  // namespace qwen
