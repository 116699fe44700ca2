// The matrix product of one block: 128 x 128 results, over a depth that is taken 64 at a time.
//
// Eight warps of 64 x 32 results each. A stage of an operand lies in shared memory either with its
// depth along the rows (as the forward product reads images and weights), or down them (as the
// gradients read what has the depth as its first dimension); ldmatrix transposes on the way.
#pragma once

#include "tile.cuh"

namespace patchgen_fast::cuda {

struct BlockTile {
  static constexpr int SIDE = 128;  // results along each side
  static constexpr int DEPTH = 64;
  static constexpr int STAGES = 2;  // one is computed on while the other is filled
  static constexpr int WARPS = 8;
  static constexpr int THREADS = WARPS * WARP;
  static constexpr int WARP_ROWS = 64, WARP_COLUMNS = 32;

  // Blocks a multiprocessor, as registers must allow; pixels of 4 bytes loaded one or two at a time
  // need too many.
  PATCHGEN_HOST_DEVICE static constexpr int blocks(int pixel_bytes, int together) {
    return pixel_bytes == 4 && together < 8 ? 1 : 2;
  }
};

enum class Depth { ALONG, DOWN };

// One stage of one operand.
template <Depth DEPTH>
using StageRows = SharedRows<DEPTH == Depth::ALONG ? BlockTile::DEPTH : BlockTile::SIDE>;

template <Depth DEPTH>
PATCHGEN_HOST_DEVICE constexpr int stage_bytes() {
  return StageRows<DEPTH>::bytes(DEPTH == Depth::ALONG ? BlockTile::SIDE : BlockTile::DEPTH);
}

// Starts copying the chunk of 8 elements at `from`, `inside` of which exist; the rest become zeros.
// `granule`: the bytes that all of its addresses are aligned to (16, 8, 4, or 2: not asynchronous).
template <class T>
PATCHGEN_DEVICE void copy_chunk(uint32_t to, const T* from, int inside, int granule) {
  const int bytes = inside * static_cast<int>(sizeof(T));
  if (granule == 16) return copy_async_16(to, from, bytes);
  const char* source = reinterpret_cast<const char*>(from);
  PATCHGEN_UNROLL
  for (int at = 0; at < CHUNK_BYTES; at += 4) {
    // What lies wholly outside is not pointed to.
    const int left = max_of(0, min_of(4, bytes - at));
    if (granule == 8) {
      const int pair = max_of(0, min_of(8, bytes - at));
      if (at % 8 == 0) copy_async_8(to + at, pair ? source + at : source, pair);
    } else if (granule == 4) {
      copy_async_4(to + at, left ? source + at : source, left);
    } else {
      const T* pair = from + at / static_cast<int>(sizeof(T));
      uint32_t low = left > 0 ? pair[0].bits : 0, high = left > 2 ? pair[1].bits : 0;
      shared_at<uint32_t>(to + at) = low | high << 16;
    }
  }
}

// The bytes that every row of `columns` 16-bit elements is aligned to, one row after the other.
PATCHGEN_HOST_DEVICE constexpr int row_granule(int columns) {
  return columns % 8 == 0 ? 16 : columns % 4 == 0 ? 8 : columns % 2 == 0 ? 4 : 2;
}

// Starts copying ROWS x WIDTH elements from `column` on; row(i) points to the beginning of row i,
// or is null where there is none. What is outside becomes zeros.
template <class T, int ROWS, int WIDTH, class Row>
PATCHGEN_DEVICE void copy_tile_async(SharedRows<WIDTH> to, Row row, int columns, int column,
                                     const T* valid, int thread) {
  constexpr int CHUNKS = SharedRows<WIDTH>::CHUNKS;
  const int granule = row_granule(columns);
  PATCHGEN_NO_UNROLL
  for (int i = thread; i < ROWS * CHUNKS; i += BlockTile::THREADS) {
    const T* from = row(i / CHUNKS);
    const int first = column + i % CHUNKS * CHUNK;
    const int inside = from ? max_of(0, min_of(CHUNK, columns - first)) : 0;
    copy_chunk(to.at(i / CHUNKS, i % CHUNKS), inside ? from + first : valid, inside, granule);
  }
}

// The 64 x 32 results of a warp.
struct WarpAccumulators {
  static constexpr int DOWN = BlockTile::WARP_ROWS / 16, ALONG = BlockTile::WARP_COLUMNS / 8;
  float part[DOWN][ALONG][4];

  PATCHGEN_DEVICE void clear() {
    PATCHGEN_UNROLL
    for (int m = 0; m < DOWN; ++m) PATCHGEN_UNROLL
    for (int n = 0; n < ALONG; ++n) PATCHGEN_UNROLL
    for (int i = 0; i < 4; ++i) part[m][n][i] = 0.f;
  }

  // += left right^T over one stage. `row` and `column` are the warp's own within the block.
  template <class T, Depth LEFT, Depth RIGHT>
  PATCHGEN_DEVICE void add_stage(StageRows<LEFT> left, StageRows<RIGHT> right, int row, int column,
                                 int lane) {
    // The four matrices of a fragment, ordered as its registers are: of a left operand down the
    // results first, of a right one along the depth first.
    const uint32_t own_left =
        LEFT == Depth::ALONG ? down_first(left, lane) : along_first(left, lane);
    const uint32_t own_right =
        RIGHT == Depth::ALONG ? along_first(right, lane) : down_first(right, lane);
    PATCHGEN_UNROLL
    for (int depth = 0; depth < BlockTile::DEPTH; depth += 16) {
      uint32_t b[ALONG / 2][4];
      PATCHGEN_UNROLL
      for (int n = 0; n < ALONG / 2; ++n) {
        if constexpr (RIGHT == Depth::ALONG)
          load_matrix_x4(b[n], right.moved(own_right, column + 16 * n, depth / CHUNK));
        else
          load_matrix_x4_transposed(b[n], right.moved(own_right, depth, column / CHUNK + 2 * n));
      }
      PATCHGEN_UNROLL
      for (int m = 0; m < DOWN; ++m) {
        uint32_t a[4];
        if constexpr (LEFT == Depth::ALONG)
          load_matrix_x4(a, left.moved(own_left, row + 16 * m, depth / CHUNK));
        else
          load_matrix_x4_transposed(a, left.moved(own_left, depth, row / CHUNK + 2 * m));
        PATCHGEN_UNROLL
        for (int n = 0; n < ALONG; ++n)
          multiply(T{}, part[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
};

// Where a warp's results lie within the block's.
struct WarpPlace {
  int row, column;
  PATCHGEN_DEVICE explicit WarpPlace(int warp)
      : row(warp % 2 * BlockTile::WARP_ROWS), column(warp / 2 * BlockTile::WARP_COLUMNS) {}
};

}  // namespace patchgen_fast::cuda
