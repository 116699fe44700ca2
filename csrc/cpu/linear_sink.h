// Where a tile of a linear layer goes: bias, activation, residual; through a buffer in the L1
// cache, so that the exponentials are compiled once and not into every shape of tile.
#pragma once

#include "integers.h"
#include "linear_activation.h"

namespace patchgen_fast {
namespace {

// Rows of out, residual and preactivation lie `columns` apart; pointers are to the block's first
// row.
template <class Out>
struct LinearSink {
  Out* out;
  Out* preactivation;   // or null
  const Out* residual;  // or null
  const float* bias;
  int64_t columns;
  Activation activation;

  template <int Rows, int Vecs>
  PATCHGEN_FAST_INLINE_MEMBER void expect(int64_t, int64_t) const {}

  template <int Rows, int Vecs>
  PATCHGEN_FAST_INLINE_MEMBER void put(const Vec (&acc)[Rows][Vecs], int64_t row,
                                       int64_t column) const {
    Vec tile[Rows * Vecs];
#pragma GCC unroll 24
    for (int i = 0; i < Rows * Vecs; ++i) {
      tile[i] = acc[i / Vecs][i % Vecs];
    }
    put_tile(tile, Rows, Vecs, row, column);
  }

  // A tile in memory, vectors of it row by row; overwritten.
  __attribute__((noinline)) void put_tile(Vec* tile, int tile_rows, int vecs, int64_t row,
                                          int64_t column) const {
    for (int r = 0; r < tile_rows; ++r) {
      for (int v = 0; v < vecs; ++v) {
        const int64_t at = column + v * kLanes;
        Vec& x = tile[r * vecs + v];
        x += load(bias + at);
        if (preactivation != nullptr) {
          store_up_to(preactivation + (row + r) * columns + at, x, columns - at);
        }
      }
    }
    for_activation(activation, [&](auto kind) {
      for (int i = 0; i < tile_rows * vecs; ++i) {
        tile[i] = activate<kind.value>(tile[i]);
      }
    });
    for (int r = 0; r < tile_rows; ++r) {
      for (int v = 0; v < vecs; ++v) {
        const int64_t at = column + v * kLanes;
        const int64_t offset = (row + r) * columns + at;
        Vec x = tile[r * vecs + v];
        if (residual != nullptr) {
          x += load_up_to(residual + offset, columns - at);
        }
        store_up_to(out + offset, x, columns - at);
      }
    }
  }
};

}  // namespace
}  // namespace patchgen_fast
