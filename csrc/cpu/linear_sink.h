// Where a tile of a linear layer goes: bias, activation, residual; through a buffer in the L1
// cache, so that the exponentials are compiled once and not into every shape of tile.
#pragma once

#include "gemm_sink.h"
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

  template <int Vecs>
  PATCHGEN_FAST_INLINE_MEMBER void expect(int64_t row, int64_t column) const {
    bring_near<true>(out + row * columns + column, Vecs * kLanes);
    if (residual != nullptr) {
      bring_near(residual + row * columns + column, Vecs * kLanes);
    }
  }

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

  // A tile in memory, vectors of it row by row.
  __attribute__((noinline)) void put_tile(const Vec* tile, int tile_rows, int vecs, int64_t row,
                                          int64_t column) const {
    const bool whole = columns - column >= vecs * kLanes && preactivation == nullptr;
    for_activation(activation, [&](auto kind) {
      if (whole && vecs == kTileVecs) {
        put_whole<kind.value, kTileVecs>(tile, tile_rows, row, column);
      } else if (whole && vecs == 1) {
        put_whole<kind.value, 1>(tile, tile_rows, row, column);
      } else {
        put_partly<kind.value>(tile, tile_rows, vecs, row, column);
      }
    });
  }

 private:
  // Whole vectors, in inference. What the loop needs is in variables: a store of 16 bits might
  // change a member.
  template <Activation Kind, int Vecs>
  PATCHGEN_FAST_INLINE_MEMBER void put_whole(const Vec* tile, int tile_rows, int64_t row,
                                             int64_t column) const {
    const int64_t pitch = columns;
    Out* to = out + row * pitch + column;
    const Out* addend = residual == nullptr ? nullptr : residual + row * pitch + column;
    Vec shift[Vecs];
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      shift[v] = load(bias + column + v * kLanes);
    }
    for (int r = 0; r < tile_rows; ++r, tile += Vecs, to += pitch) {
      Vec x[Vecs];
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) {
        x[v] = tile[v] + shift[v];
      }
      activate<Kind, Out>(x);
      if (addend != nullptr) {
#pragma GCC unroll 4
        for (int v = 0; v < Vecs; ++v) {
          x[v] += load(addend + v * kLanes);
        }
        addend += pitch;
      }
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) {
        store(to + v * kLanes, x[v]);
      }
    }
  }

  template <Activation Kind>
  PATCHGEN_FAST_INLINE_MEMBER void put_partly(const Vec* tile, int tile_rows, int vecs, int64_t row,
                                              int64_t column) const {
    for (int r = 0; r < tile_rows; ++r) {
      for (int v = 0; v < vecs; ++v) {
        const int64_t at = column + v * kLanes;
        const int64_t offset = (row + r) * columns + at;
        const int64_t left = columns - at;
        Vec x[] = {tile[r * vecs + v] + load(bias + at)};
        if (preactivation != nullptr) {
          store_up_to(preactivation + offset, x[0], left);
        }
        activate<Kind, Out>(x);
        if (residual != nullptr) {
          x[0] += load_up_to(residual + offset, left);
        }
        store_up_to(out + offset, x[0], left);
      }
    }
  }
};

// The sink of all rows of a layer; `bias` as widen_bias leaves it.
template <class T>
PATCHGEN_FAST_INLINE LinearSink<T> sink_of(const LinearForward& f, const float* bias) {
  return {static_cast<T*>(f.out),
          static_cast<T*>(f.preactivation),
          static_cast<const T*>(f.residual),
          bias,
          f.columns,
          f.activation};
}

// Columns [first, last) of the bias as floats, up to whole vectors; zeros where there is none.
template <class T>
PATCHGEN_FAST_INLINE void widen_bias(const LinearForward& f, int64_t first, int64_t last,
                                     float* to) {
  const T* bias = static_cast<const T*>(f.bias);
  for (int64_t c = first; c < last; c += kLanes) {
    store(to + c, bias == nullptr ? Vec{} : load_up_to(bias + c, f.columns - c));
  }
}

}  // namespace
}  // namespace patchgen_fast
