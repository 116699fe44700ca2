// Where finished tiles go. A sink is handed the accumulators while they are still in registers.
#pragma once

#include "gemm_tile.h"
#include "prefetch.h"

namespace patchgen_fast {
namespace {

// `count` elements, into the L1 cache.
template <bool kToWrite = false, class Element>
PATCHGEN_FAST_INLINE void bring_near(const Element* from, int64_t count) {
  bring_row<kToWrite, kL1>(from, count * static_cast<int64_t>(sizeof(Element)));
}

template <class Out, class Addend = Out>
struct RowTarget {
  Out* out;
  const Addend* addend;
};

// out = acc + bias, or acc + bias + addend, row by row, rounded once.
template <class Out, class Addend = Out>
struct RowSink {
  const RowTarget<Out, Addend>* rows;  // of this block of A
  const float* bias;                   // padded to whole panels
  int64_t columns;
  bool adds;  // the rows' addends

  // Fetches what a row of the tile will be written and added to, while the tile is computed.
  template <int Vecs>
  PATCHGEN_FAST_INLINE_MEMBER void expect(int64_t row, int64_t column) const {
    const RowTarget<Out, Addend>& target = rows[row];
    bring_near<true>(target.out + column, Vecs * kLanes);
    if (adds) {
      bring_near(target.addend + column, Vecs * kLanes);
    }
  }

  template <int Rows, int Vecs>
  PATCHGEN_FAST_INLINE_MEMBER void put(const Vec (&acc)[Rows][Vecs], int64_t row,
                                       int64_t column) const {
    const int64_t left = columns - column;
    if (left < Vecs * kLanes) {
      Vec copy[Rows * Vecs];  // a pointer to the accumulators would force them out of registers
#pragma GCC unroll 24
      for (int i = 0; i < Rows * Vecs; ++i) {
        copy[i] = acc[i / Vecs][i % Vecs];
      }
      put_partly(copy, Rows, Vecs, row, column);
    } else if (adds) {
      put_whole<true>(acc, row, column);
    } else {
      put_whole<false>(acc, row, column);
    }
  }

 private:
  template <bool Adds, int Rows, int Vecs>
  PATCHGEN_FAST_INLINE_MEMBER void put_whole(const Vec (&acc)[Rows][Vecs], int64_t row,
                                             int64_t column) const {
    const RowTarget<Out, Addend>* targets = rows + row;
    const float* bias_here = bias + column;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const RowTarget<Out, Addend> target = targets[r];
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) {
        Vec x = acc[r][v] + load(bias_here + v * kLanes);
        if constexpr (Adds) {
          x += load(target.addend + column + v * kLanes);
        }
        store(target.out + column + v * kLanes, x);
      }
    }
  }

  // The last panel, where it is not full: rare, hence out of line and through memory.
  __attribute__((noinline)) void put_partly(const Vec* acc, int tile_rows, int vecs, int64_t row,
                                            int64_t column) const {
    for (int r = 0; r < tile_rows; ++r) {
      for (int v = 0; v < vecs; ++v) {
        const int64_t at = column + v * kLanes;
        const int64_t count = columns - at;
        Vec x = acc[r * vecs + v] + load(bias + at);
        if (adds) {
          x += load_up_to(rows[row + r].addend + at, count);
        }
        store_up_to(rows[row + r].out + at, x, count);
      }
    }
  }
};

}  // namespace
}  // namespace patchgen_fast
