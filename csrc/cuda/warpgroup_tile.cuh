// Tiles of a warpgroup: 64 rows of 16-bit elements in swizzled parts of 64 columns, as operands of
// wgmma, and the sums of their products.
#pragma once

#include "ptx_sm90.cuh"

namespace patchgen_fast::cuda {

constexpr int WARPGROUP = 4 * WARP;
constexpr int WARPGROUP_ROWS = 64;
constexpr int PART = 64;  // columns in a swizzled row of 128 bytes

// Bytes of `rows` swizzled rows of one part.
PATCHGEN_HOST_DEVICE constexpr int part_bytes(int rows) {
  return SharedRows<PART>::bytes(rows);
}

// 64 rows as left operands over all columns, in registers or where they lie.
template <class T, int PARTS, bool HELD>
struct LeftTile {
  uint32_t address = 0;  // of the first part
  LeftFragments<T, PART> held[HELD ? PARTS : 1];

  PATCHGEN_DEVICE void load(uint32_t stage, int warp, int lane) {
    lane = opaque(lane), warp = opaque(warp);
    address = stage;
    if constexpr (HELD) {
      PATCHGEN_UNROLL
      for (int part = 0; part < PARTS; ++part)
        held[part].load(SharedRows<PART>{stage + part * part_bytes(WARPGROUP_ROWS)}, warp * TILE,
                        lane);
    }
  }

  // squares = rows right^T, where `right` is as many rows as the squares are wide; not waited for.
  template <int TILES>
  PATCHGEN_DEVICE void multiply(Square (&squares)[TILES], uint32_t right, int bytes_of_part) const {
    [[maybe_unused]] const uint64_t own = swizzled_operand(address);
    PATCHGEN_UNROLL
    for (int part = 0; part < PARTS; ++part) {
      const uint64_t rows = swizzled_operand(right + part * bytes_of_part);
      PATCHGEN_UNROLL
      for (int k = 0; k < PART / 16; ++k) {
        if constexpr (HELD)
          wgmma_rows(T{}, squares, held[part].held[k], step_operand(rows, k * 32), part + k > 0);
        else
          wgmma_rows(T{}, squares, step_operand(own, part * part_bytes(WARPGROUP_ROWS) + k * 32),
                     step_operand(rows, k * 32), part + k > 0);
      }
    }
  }
};

// Sums of 64 rows by PARTS x 64 columns.
template <class T, int PARTS>
struct TileSums {
  RowAccumulators<PART> part[PARTS];

  PATCHGEN_DEVICE void clear() {
    PATCHGEN_UNROLL
    for (int i = 0; i < PARTS; ++i) part[i].clear();
  }

  // += left matrix, where `matrix` is as many rows as `left` is wide; not waited for.
  template <int TILES>
  PATCHGEN_DEVICE void add_product(const uint32_t (&left)[TILES][4], uint32_t matrix,
                                   int bytes_of_part) {
    PATCHGEN_UNROLL
    for (int i = 0; i < PARTS; ++i) {
      const uint64_t rows = swizzled_operand(matrix + i * bytes_of_part);
      PATCHGEN_UNROLL
      for (int t = 0; t < TILES; ++t)
        wgmma_matrix_64(T{}, part[i].part[0], left[t], step_operand(rows, part_bytes(t * TILE)));
    }
  }

  // A warp's 16 rows, by way of their place in `stage`, which no other warp reads.
  PATCHGEN_DEVICE void store(uint32_t stage, T* to, int64_t row_stride, int rows, int width,
                             float scale, int warp, int lane) {
    lane = opaque(lane), warp = opaque(warp);
    PATCHGEN_UNROLL
    for (int i = 0; i < PARTS; ++i) {
      const SharedRows<PART> own{stage + i * part_bytes(WARPGROUP_ROWS) + part_bytes(warp * TILE)};
      part[i].scale_rows(scale, scale);
      part[i].template store<T>(own, to + warp * TILE * row_stride + i * PART, row_stride,
                                rows - warp * TILE, width - i * PART, lane);
    }
  }
};

}  // namespace patchgen_fast::cuda
