// The tile registers of AMX: eight of up to 16 rows of 64 bytes. Without AMX (the set `base`) the same operations in plain C++, so that tests
// run the kernels of tiles on any machine.
//
// By assembly: intrinsics of gcc 12 do not tell the compiler which memory they read and write.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace qwen::QWEN_SET {

constexpr int kTileBytes = 64;  // of a row

// Shapes of the tiles 0..7, as LDTILECFG reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int count, int bytes) {
    rows[tile] = uint8_t(count);
    row_bytes[tile] = uint16_t(bytes);
  }
};
static_assert(sizeof(TileShapes) == 64, "LDTILECFG reads 64 bytes");

#if defined(__AMX_INT8__)

inline void tiles_begin(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory"); }
inline void tiles_end() { __asm__ volatile("tilerelease" : : : "memory"); }

template <int T>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
inline void tile_load(const void* from, size_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, size_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}
// sum[m][n] += A[m][4 k + j] * B[k][4 n + j] over all k and j, signed bytes
template <int SUM, int A, int B>
inline void tile_dot() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
}

// sum[m][n] += A[m][2 k + j] * B[k][2 n + j] over all k and j: bf16, summed in fp32
template <int SUM, int A, int B>
inline void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
}

#else

struct Tiles {
  TileShapes shapes;
  alignas(64) uint8_t bytes[8][16][64] = {};
};
inline Tiles& tiles() {
  static thread_local Tiles all;
  return all;
}

inline void tiles_begin(const TileShapes& shapes) {
  tiles() = Tiles();
  tiles().shapes = shapes;
}
inline void tiles_end() { tiles_begin(TileShapes()); }

template <int T>
inline void tile_zero() {
  std::memset(tiles().bytes[T], 0, sizeof(tiles().bytes[T]));
}
template <int T>
inline void tile_load(const void* from, size_t stride) {
  tile_zero<T>();
  for (int row = 0; row < tiles().shapes.rows[T]; row++)
    std::memcpy(tiles().bytes[T][row], static_cast<const uint8_t*>(from) + size_t(row) * stride, tiles().shapes.row_bytes[T]);
}
template <int T>
inline void tile_store(void* to, size_t stride) {
  for (int row = 0; row < tiles().shapes.rows[T]; row++)
    std::memcpy(static_cast<uint8_t*>(to) + size_t(row) * stride, tiles().bytes[T][row], tiles().shapes.row_bytes[T]);
}
template <int SUM, int A, int B>
inline void tile_dot() {
  Tiles& all = tiles();
  for (int m = 0; m < all.shapes.rows[SUM]; m++)
    for (int n = 0; n < all.shapes.row_bytes[SUM] / 4; n++) {
      int32_t sum;
      std::memcpy(&sum, &all.bytes[SUM][m][4 * n], 4);
      for (int k = 0; k < all.shapes.row_bytes[A] / 4; k++)
        for (int j = 0; j < 4; j++) sum += int32_t(int8_t(all.bytes[A][m][4 * k + j])) * int32_t(int8_t(all.bytes[B][k][4 * n + j]));
      std::memcpy(&all.bytes[SUM][m][4 * n], &sum, 4);
    }
}
// As AMX: even and odd j apart, then both to the sum. It takes denormals for 0, which is left out here.
template <int SUM, int A, int B>
inline void tile_dot_bf16() {
  Tiles& all = tiles();
  const auto value = [](const uint8_t* at) {
    const uint32_t bits = uint32_t(at[0]) << 16 | uint32_t(at[1]) << 24;
    float made;
    std::memcpy(&made, &bits, 4);
    return made;
  };
  for (int m = 0; m < all.shapes.rows[SUM]; m++)
    for (int n = 0; n < all.shapes.row_bytes[SUM] / 4; n++) {
      float sum, parts[2] = {};
      std::memcpy(&sum, &all.bytes[SUM][m][4 * n], 4);
      for (int k = 0; k < all.shapes.row_bytes[A] / 4; k++)
        for (int j = 0; j < 2; j++) parts[j] += value(&all.bytes[A][m][4 * k + 2 * j]) * value(&all.bytes[B][k][4 * n + 2 * j]);
      sum += parts[0] + parts[1];
      std::memcpy(&all.bytes[SUM][m][4 * n], &sum, 4);
    }
}

#endif

}  // namespace qwen::QWEN_SET
