// Where finished tiles go. A sink is handed the accumulators while they are still in registers.
#pragma once

#include "gemm_tile.h"

namespace patchgen_fast {
namespace {

template <class Out>
struct RowTarget {
  Out* out;
  const Out* addend;  // null: nothing is added
};

// out = acc + bias + addend, row by row, rounded once.
template <class Out>
struct RowSink {
  const RowTarget<Out>* rows;  // of this block of A
  const float* bias;           // padded to whole panels
  int64_t columns;

  template <int Rows, int Vecs>
  PATCHGEN_FAST_INLINE_MEMBER void put(const Vec (&acc)[Rows][Vecs], int64_t row,
                                       int64_t column) const {
    const int64_t left = columns - column;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const RowTarget<Out> target = rows[row + r];
      if (left >= Vecs * kLanes) {
        put_row<Vecs>(acc[r], target, column);
      } else {
        put_row_partial<Vecs>(acc[r], target, column, left);
      }
    }
  }

 private:
  template <int Vecs>
  PATCHGEN_FAST_INLINE_MEMBER void put_row(const Vec (&acc)[Vecs], RowTarget<Out> target,
                                           int64_t column) const {
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      const int64_t at = column + v * kLanes;
      Vec x = acc[v] + load(bias + at);
      if (target.addend != nullptr) {
        x += load(target.addend + at);
      }
      store(target.out + at, x);
    }
  }

  template <int Vecs>
  PATCHGEN_FAST_INLINE_MEMBER void put_row_partial(const Vec (&acc)[Vecs], RowTarget<Out> target,
                                                   int64_t column, int64_t left) const {
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      const int64_t at = column + v * kLanes;
      const int64_t count = left - v * kLanes;
      Vec x = acc[v] + load(bias + at);
      if (target.addend != nullptr) {
        x += load_up_to(target.addend + at, count);
      }
      store_up_to(target.out + at, x, count);
    }
  }
};

}  // namespace
}  // namespace patchgen_fast
