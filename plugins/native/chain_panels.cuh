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

// 16 bytes of shared memory where `there`; else x stays as it is.
__device__ inline void load_where(bool there, uint32_t at, uint4& x) {
  asm volatile("{.reg .pred p; setp.ne.s32 p,%5,0; @p ld.shared.v4.u32 {%0,%1,%2,%3},[%4];}"
               : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
               : "r"(at), "r"(int(there)));
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

  // A warp's unit. Rows of activations are columns of the product; lanes without a row make columns that nobody reads.
  template <int LOG_ROWS>
  struct Unit {
    uint4 a[kChunks], d[kChunks];

    __device__ void load(const uint8_t* stage) {
      const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
      const uint8_t* at = stage + 2 * g * kRow + warp * kUnitBytes + t * 16;
#pragma unroll
      for (int step = 0; step < kChunks; step++) {
        a[step] = *reinterpret_cast<const uint4*>(at + step * 64);
        d[step] = *reinterpret_cast<const uint4*>(at + kRow + step * 64);
      }
    }
    __device__ void load_input(int unit, const uint8_t* staged, const float*, uint4 (&x)[kChunks]) {
      const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
      const uint32_t at = shared_of(staged) + chunk_at<LOG_ROWS>(g, t) + unit * (kUnitK * int(sizeof(T)) << LOG_ROWS);
#pragma unroll
      for (int step = 0; step < kChunks; step++) load_where(g < 1 << LOG_ROWS, at + step * (64 << LOG_ROWS), x[step]);
    }
    __device__ void multiply(const uint4 (&x)[kChunks], float (&sum)[4]) const {
#pragma unroll
      for (int step = 0; step < kChunks; step++) {
        qwen::multiply<T>(sum, a[step].x, d[step].x, a[step].y, d[step].y, x[step].x, x[step].y);
        qwen::multiply<T>(sum, a[step].z, d[step].z, a[step].w, d[step].w, x[step].z, x[step].w);
      }
    }
  };
  template <int LOG_ROWS>
  using Tail = Unit<LOG_ROWS>;

  // A warp's sums of a panel, [rows][16]: where this lane's are, and what it has.
  template <int LOG_ROWS>
  __device__ static int place_of_sums() {
    return threadIdx.x % 4 * 2 * kPanelRows + threadIdx.x % 32 / 4 * 2;
  }
  template <int LOG_ROWS>
  __device__ static void keep(float* to, const float (&sum)[4]) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (2 * t + i < 1 << LOG_ROWS) *reinterpret_cast<float2*>(to + i * kPanelRows) = make_float2(sum[i], sum[2 + i]);
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
    if (column % kBlock == 0) zeros[(column / kUnitK << LOG_ROWS) * kGroupBlocks + m * kGroupBlocks + column / kBlock % kGroupBlocks] = sum;
  }
  static int zero_bytes(int K, int log_rows) { return K / kBlock * int(sizeof(float)) << log_rows; }  // [units][rows][blocks]

  // The eight columns of a product are not only rows of activations but also blocks: lanes hold activations for the columns of their own block, and zeros
  // for the others. So a sum of products has several blocks, and a lane of the result has two neighboring ones of one row: columns are
  // block (1 row), row * 4 + block (2), row * 2 + block % 2 (4 rows, two sums).
  template <int LOG_ROWS>
  static constexpr int kSums = LOG_ROWS < 2 ? 1 : 2;
  template <int LOG_ROWS>
  __device__ static int column_row() {
    return LOG_ROWS == 0 ? 0 : threadIdx.x % 32 / 4 >> (3 - LOG_ROWS);
  }
  // Whether this lane's column is for block `block` of a unit.
  template <int LOG_ROWS>
  __device__ static bool owns(int block) {
    const int g = threadIdx.x % 32 / 4;
    return LOG_ROWS == 0 ? g == block : LOG_ROWS == 1 ? g % 4 == block : g % 2 == block % 2;
  }

  template <int LOG_ROWS>
  struct Unit {
    uint2 w[kGroupBlocks];
    __half2 scales[2 * kSums<LOG_ROWS>];  // of this lane's blocks
    float zero[2 * kSums<LOG_ROWS>];

    __device__ void load(const uint8_t* stage) {
      const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
      const uint8_t* at = stage + warp * kUnitBytes;
#pragma unroll
      for (int block = 0; block < kGroupBlocks; block++) w[block] = *reinterpret_cast<const uint2*>(at + kScales + block * 256 + t * 64 + g * 8);
#pragma unroll
      for (int i = 0; i < 2 * kSums<LOG_ROWS>; i++)
        scales[i] = *reinterpret_cast<const __half2*>(at + (i + (LOG_ROWS < 2 ? t % 2 * 2 : 0)) * kPanelRows * 2 + g * 4);
    }
    __device__ void load_input(int unit, const uint8_t* staged, const float* zeros, uint4 (&x)[kChunks]) {
      const int t = threadIdx.x % 4;
      const uint32_t at = shared_of(staged) + chunk_at<LOG_ROWS>(column_row<LOG_ROWS>(), t) + unit * (kUnitK * 2 << LOG_ROWS);
#pragma unroll
      for (int block = 0; block < kGroupBlocks; block++) load_where(owns<LOG_ROWS>(block), at + block * (64 << LOG_ROWS), x[block]);
      const float* own = zeros + (unit << LOG_ROWS) * kGroupBlocks;
      if constexpr (LOG_ROWS == 2) {
        const float4 all = *reinterpret_cast<const float4*>(own + t * 4);
        zero[0] = all.x, zero[1] = all.y, zero[2] = all.z, zero[3] = all.w;
      } else {
        const float2 both = *reinterpret_cast<const float2*>(own + (LOG_ROWS ? t : t % 2) * 2);
        zero[0] = both.x, zero[1] = both.y;
      }
    }
    __device__ void multiply(const uint4 (&x)[kChunks], float (&sum)[4]) const {
#pragma unroll
      for (int s = 0; s < kSums<LOG_ROWS>; s++) {
        float c[4] = {zero[2 * s], zero[2 * s + 1], zero[2 * s], zero[2 * s + 1]}, d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < kGroupBlocks / kSums<LOG_ROWS>; i++) {
          const int block = s * 2 + i;
          const uint2 v = make_uint2(w[block].x >> 8, w[block].y >> 8);
          qwen::multiply<T>(c, low(w[block].x), low(w[block].y), high(w[block].x), high(w[block].y), x[block].x, x[block].y);
          qwen::multiply<T>(d, low(v.x), low(v.y), high(v.x), high(v.y), x[block].z, x[block].w);
        }
        const float2 even = __half22float2(scales[2 * s]), odd = __half22float2(scales[2 * s + 1]);
        sum[2 * s] += (c[0] + d[0]) * even.x, sum[2 * s + 1] += (c[2] + d[2]) * even.y;
        sum[2 * s] += (c[1] + d[1]) * odd.x, sum[2 * s + 1] += (c[3] + d[3]) * odd.y;
      }
    }
  };

  // The activations lie where those of the first block of a unit do.
  template <int LOG_ROWS>
  struct Tail {
    uint4 a, d;

    __device__ void load(const uint8_t* stage) {
      const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
      const uint8_t* at = stage + 2 * g * kTailRow + warp * kTailK * 2 + t * 16;
      a = *reinterpret_cast<const uint4*>(at), d = *reinterpret_cast<const uint4*>(at + kTailRow);
    }
    __device__ void load_input(int unit, const uint8_t* staged, const float*, uint4 (&x)[kChunks]) {
      const uint32_t at = shared_of(staged) + chunk_at<LOG_ROWS>(column_row<LOG_ROWS>(), threadIdx.x % 4) + unit * (kTailK * 2 << LOG_ROWS);
      load_where(owns<LOG_ROWS>(0), at, x[0]);
    }
    __device__ void multiply(const uint4 (&x)[kChunks], float (&sum)[4]) const {
      float c[4] = {sum[0], 0.0f, sum[1], 0.0f};
      qwen::multiply<T>(c, even(a.x, a.y), even(d.x, d.y), even(a.z, a.w), even(d.z, d.w), x[0].x, x[0].y);
      qwen::multiply<T>(c, odd(a.x, a.y), odd(d.x, d.y), odd(a.z, a.w), odd(d.z, d.w), x[0].z, x[0].w);
      sum[0] = c[0], sum[1] = c[2];
    }
  };

  // A warp's sums of a panel, [rows][16]: where this lane's are, and what it has: the first two blocks of all units, and the last two.
  template <int LOG_ROWS>
  __device__ static int place_of_sums() {
    return (LOG_ROWS == 2 ? threadIdx.x % 4 : threadIdx.x % 4 / 2) * kPanelRows + threadIdx.x % 32 / 4 * 2;
  }
  template <int LOG_ROWS>
  __device__ static void keep(float* to, const float (&sum)[4]) {
    const int t = threadIdx.x % 4;
    float2 both = make_float2(sum[0], sum[1]);
    if constexpr (LOG_ROWS == 2)
      both.x += sum[2], both.y += sum[3];
    else
      both.x += __shfl_xor_sync(0xffffffffu, both.x, 1), both.y += __shfl_xor_sync(0xffffffffu, both.y, 1);
    if (LOG_ROWS == 2 || (t % 2 == 0 && t / 2 < 1 << LOG_ROWS)) *reinterpret_cast<float2*>(to) = both;
  }

 private:
  __device__ static uint32_t even(uint32_t p, uint32_t q) { return __byte_perm(p, q, 0x5410); }
  __device__ static uint32_t odd(uint32_t p, uint32_t q) { return __byte_perm(p, q, 0x7632); }
  __device__ static uint32_t low(uint32_t word) { return masked(word, 0x000F000Fu, kHalf ? 0x64006400u : 0x43004300u); }
  __device__ static uint32_t high(uint32_t word) { return kHalf ? masked(word, 0x00F000F0u, 0x54005400u) : low(word >> 4); }
};

}  // namespace qwen
