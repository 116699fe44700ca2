// Matrices of 16-bit elements in shared memory, and the fragments that tensor cores take from them.
#pragma once

#include "element.cuh"

namespace patchgen_fast::cuda {

constexpr int WARP = 32;
constexpr int TILE = 16;  // rows of a tile: what one matrix instruction takes
constexpr int CHUNK =
    8;  // elements in 16 bytes: what one asynchronous copy and one matrix row hold
constexpr int CHUNK_BYTES = 16;

PATCHGEN_HOST_DEVICE constexpr int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}
PATCHGEN_HOST_DEVICE constexpr int round_up(int a, int b) {
  return ceil_div(a, b) * b;
}

PATCHGEN_DEVICE int min_of(int a, int b) {
  return a < b ? a : b;
}
PATCHGEN_DEVICE int max_of(int a, int b) {
  return a > b ? a : b;
}

// Rows of WIDTH elements, laid out so that eight consecutive rows at one chunk lie in different
// banks: where 4 or 8 chunks make a row they are permuted by the row (no space lost), else the
// pitch is made odd (for WIDTH = 72 it is odd already). At 16 chunks an odd pitch costs 6 % of
// space, a permutation 8 address registers for every matrix that a loop reads.
template <int WIDTH>
struct SharedRows {
  static_assert(WIDTH % CHUNK == 0);
  static constexpr int CHUNKS = WIDTH / CHUNK;
  static constexpr bool PERMUTED = CHUNKS == 4 || CHUNKS == 8;
  static constexpr int PITCH = PERMUTED ? CHUNKS : CHUNKS | 1;
  static constexpr int ROW_BYTES = PITCH * CHUNK_BYTES;
  PATCHGEN_HOST_DEVICE static constexpr int bytes(int rows) { return rows * ROW_BYTES; }

  uint32_t base;  // a multiple of 16 rows, so that permuting is an exclusive or of the address

  PATCHGEN_DEVICE uint32_t at(unsigned row, unsigned chunk) const {
    constexpr unsigned ROWS_A_LINE = PERMUTED ? 8 / CHUNKS : 1;  // rows in 128 bytes
    unsigned place = PERMUTED ? chunk ^ (row / ROWS_A_LINE % CHUNKS) : chunk;
    return base + row * ROW_BYTES + place * CHUNK_BYTES;
  }

  // at(row + rows, chunk + chunks) from at(row, chunk), for rows a multiple of 16, chunks even and
  // chunk 0 or 1. A lane works out its own part once; the rest are constants.
  PATCHGEN_DEVICE static uint32_t moved(uint32_t address, unsigned rows, unsigned chunks) {
    uint32_t along = PERMUTED ? address ^ (chunks * CHUNK_BYTES) : address + chunks * CHUNK_BYTES;
    return along + rows * ROW_BYTES;
  }
};

// Where lane l points for the fragments of the 16 rows at the beginning. Left operands, and right
// operands that are transposed on the way, take the 8x8 matrices down the rows first; right
// operands along the columns first.
template <int WIDTH>
PATCHGEN_DEVICE uint32_t down_first(SharedRows<WIDTH> rows, int lane) {
  return rows.at(lane % 16u, lane / 16u);
}
template <int WIDTH>
PATCHGEN_DEVICE uint32_t along_first(SharedRows<WIDTH> rows, int lane) {
  return rows.at(lane % 8u + lane / 16u * 8u, lane / 8u % 2u);
}

// Starts copying rows [0, padded_rows) of a matrix; rows from `rows` on, and columns from `width`
// on, become zeros, which is what makes any count of rows and any width below WIDTH right.
template <class T, int WIDTH>
PATCHGEN_DEVICE void copy_rows_async(SharedRows<WIDTH> to, const T* from, int64_t row_stride,
                                     int rows, int padded_rows, int width, int thread,
                                     int threads) {
  constexpr int CHUNKS = SharedRows<WIDTH>::CHUNKS;
  for (int i = thread; i < padded_rows * CHUNKS; i += threads) {
    int row = i / CHUNKS, chunk = i % CHUNKS;
    bool inside = row < rows && chunk * CHUNK < width;
    const T* source = inside ? from + row * row_stride + chunk * CHUNK : from;
    copy_async_16(to.at(row, chunk), source, inside ? CHUNK_BYTES : 0);
  }
}

// Zeros in rows [0, rows) of a matrix in global memory.
template <class T>
PATCHGEN_DEVICE void clear_rows(T* to, int64_t row_stride, int rows, int width, int thread,
                                int threads) {
  const int chunks = width / CHUNK;
  for (int64_t i = thread; i < static_cast<int64_t>(rows) * chunks; i += threads)
    *reinterpret_cast<uint4*>(to + i / chunks * row_stride + i % chunks * CHUNK) = {0, 0, 0, 0};
}

// 16 rows as left operands over all of WIDTH: k-steps of 16, and one of 8 where WIDTH asks for it
// (72 = 4 x 16 + 8), so that no product is spent on padding. HELD in registers, or, where there
// are too few, loaded again for each product from rows that must then stay in shared memory.
template <class T, int WIDTH, bool HELD = true>
struct LeftFragments {
  static constexpr int STEPS = WIDTH / 16;
  static constexpr bool HALF_STEP = WIDTH % 16 != 0;
  uint32_t held[HELD ? STEPS : 1][4];
  uint32_t held_half[2];
  uint32_t address = 0;

  PATCHGEN_DEVICE void load(SharedRows<WIDTH> rows, int row, int lane) {
    address = rows.moved(down_first(rows, lane), row, 0);
    if constexpr (HELD) {
      PATCHGEN_UNROLL
      for (int k = 0; k < STEPS; ++k) load_step(held[k], k);
      if constexpr (HALF_STEP) load_half_step(held_half);
    }
  }
  PATCHGEN_DEVICE void step(uint32_t (&a)[4], int k) const {
    if constexpr (HELD) {
      PATCHGEN_UNROLL
      for (int i = 0; i < 4; ++i) a[i] = held[k][i];
    } else {
      load_step(a, k);
    }
  }
  PATCHGEN_DEVICE void half_step(uint32_t (&a)[2]) const {
    if constexpr (HELD) {
      a[0] = held_half[0];
      a[1] = held_half[1];
    } else {
      load_half_step(a);
    }
  }

 private:
  PATCHGEN_DEVICE void load_step(uint32_t (&a)[4], int k) const {
    load_matrix_x4(a, SharedRows<WIDTH>::moved(address, 0, 2 * k));
  }
  // An x2 load takes its addresses from the lower 16 lanes only.
  PATCHGEN_DEVICE void load_half_step(uint32_t (&a)[2]) const {
    load_matrix_x2(a, SharedRows<WIDTH>::moved(address, 0, 2 * STEPS));
  }
};

// A 16x16 accumulator: two instructions' worth, columns 0 to 7 and 8 to 15.
// Element i of part n of a lane is at row lane/4 + 8 (i/2), column 8 n + 2 (lane%4) + i%2.
using Square = float[2][4];

PATCHGEN_DEVICE void fill(Square& square, float value) {
  PATCHGEN_UNROLL
  for (int n = 0; n < 2; ++n) PATCHGEN_UNROLL
  for (int i = 0; i < 4; ++i) square[n][i] = value;
}

// square = left right^T over WIDTH, where `right` is the 16 rows from `row` on.
template <class T, int WIDTH, bool HELD>
PATCHGEN_DEVICE void multiply_rows(Square& square, const LeftFragments<T, WIDTH, HELD>& left,
                                   SharedRows<WIDTH> right, int row, int lane) {
  using Left = LeftFragments<T, WIDTH, HELD>;
  fill(square, 0.f);
  // Where registers are short, not all loads of a row at once.
  [[maybe_unused]] constexpr int TOGETHER = HELD ? Left::STEPS : 4;
  const uint32_t own = along_first(right, lane);
  PATCHGEN_UNROLL_BY(TOGETHER)
  for (int k = 0; k < Left::STEPS; ++k) {
    uint32_t a[4], b[4];  // rows 0-7: b[0], b[1]; rows 8-15: b[2], b[3]
    left.step(a, k);
    load_matrix_x4(b, right.moved(own, row, 2 * k));
    multiply(T{}, square[0], a, b[0], b[1]);
    multiply(T{}, square[1], a, b[2], b[3]);
  }
  if constexpr (Left::HALF_STEP) {
    uint32_t a[2], b[2];
    left.half_step(a);
    load_matrix_x2(b, right.moved(down_first(right, lane), row, 2 * Left::STEPS));
    multiply(T{}, square[0], a, b[0]);
    multiply(T{}, square[1], a, b[1]);
  }
}

// A 16x16 accumulator rounded to T is, register for register, a left operand over its columns.
template <class T>
PATCHGEN_DEVICE void to_left_operand(uint32_t (&a)[4], const Square& square) {
  PATCHGEN_UNROLL
  for (int n = 0; n < 2; ++n) {
    a[2 * n] = pack<T>(square[n][0], square[n][1]);
    a[2 * n + 1] = pack<T>(square[n][2], square[n][3]);
  }
}

// Accumulators of 16 rows by WIDTH columns.
template <int WIDTH>
struct RowAccumulators {
  static constexpr int PARTS = WIDTH / 8;
  float part[PARTS][4];

  PATCHGEN_DEVICE void clear() {
    PATCHGEN_UNROLL
    for (int n = 0; n < PARTS; ++n) PATCHGEN_UNROLL
    for (int i = 0; i < 4; ++i) part[n][i] = 0.f;
  }

  // += left right, where `right` is the 16 rows from `row` on.
  template <class T>
  PATCHGEN_DEVICE void add_product(const uint32_t (&left)[4], SharedRows<WIDTH> right, int row,
                                   int lane) {
    const uint32_t own = down_first(right, lane);
    PATCHGEN_UNROLL
    for (int n = 0; n + 1 < PARTS; n += 2) {
      uint32_t b[4];
      load_matrix_x4_transposed(b, right.moved(own, row, n));
      multiply(T{}, part[n], left, b[0], b[1]);
      multiply(T{}, part[n + 1], left, b[2], b[3]);
    }
    if constexpr (PARTS % 2 != 0) {
      uint32_t b[2];
      load_matrix_x2_transposed(b, right.moved(own, row, PARTS - 1));
      multiply(T{}, part[PARTS - 1], left, b[0], b[1]);
    }
  }

  PATCHGEN_DEVICE void scale_rows(float upper, float lower) {
    PATCHGEN_UNROLL
    for (int n = 0; n < PARTS; ++n) {
      part[n][0] *= upper;
      part[n][1] *= upper;
      part[n][2] *= lower;
      part[n][3] *= lower;
    }
  }

  // Rounds to T and writes rows [0, rows) by way of `stage`, 16 rows of this warp's own, so that
  // global memory sees whole 16-byte stores. The warp may use `stage` again after __syncwarp().
  template <class T>
  PATCHGEN_DEVICE void store(SharedRows<WIDTH> stage, T* to, int64_t row_stride, int rows,
                             int width, int lane) const {
    PATCHGEN_UNROLL
    for (int n = 0; n < PARTS; ++n) PATCHGEN_UNROLL
    for (int half = 0; half < 2; ++half)
      shared_at<uint32_t>(stage.at(lane / 4 + 8 * half, n) + lane % 4 * 4) =
          pack<T>(part[n][2 * half], part[n][2 * half + 1]);
    __syncwarp();
    for (int i = lane; i < TILE * PARTS; i += WARP) {
      int row = i / PARTS, chunk = i % PARTS;
      if (row < rows && chunk * CHUNK < width)
        *reinterpret_cast<uint4*>(to + row * row_stride + chunk * CHUNK) =
            shared_at<uint4>(stage.at(row, chunk));
    }
  }
};

}  // namespace patchgen_fast::cuda
