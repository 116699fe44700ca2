// Sums over the rows of a matrix.
//
//     sums[column] = sum over rows of x[row, column]
//
// One task owns kSumColumns columns and walks down all rows in their order, a few vectors at a
// time, whose sums stay in registers. Sums are compensated (Kahan 1965), so their error does not
// grow with the number of rows; the gradient of a bias has thousands. Every element is read once;
// the result does not depend on the threads.
#pragma once

#include "gemm_pack.h"
#include "gemm_sums.h"

namespace patchgen_fast {
namespace {

// A sum that carries what its additions have rounded away.
struct CompensatedSum {
  Vec sum;
  Vec lost;

  PATCHGEN_FAST_INLINE_MEMBER void add(Vec x) {
    const Vec wanted = x - lost;
    const Vec next = sum + wanted;
    lost = (next - sum) - wanted;
    sum = next;
  }
};

// The same in memory: rows of sums, and behind them, `pitch` floats on, what was lost.
PATCHGEN_FAST_INLINE void add_compensated(float* sums, int64_t pitch, Vec x) {
  CompensatedSum s{load(sums), load(sums + pitch)};
  s.add(x);
  store(sums, s.sum);
  store(sums + pitch, s.lost);
}

// `Vecs` vectors of columns from `x` on, of which `columns` exist.
template <class T, int Vecs>
static void sum_vectors(const ColumnSums& s, const T* x, float* sums, int64_t columns) {
  CompensatedSum totals[Vecs] = {};
  for (int64_t r = 0; r < s.rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      totals[v].add(load_up_to(x + r * s.stride + v * kLanes, columns - v * kLanes));
    }
  }
  for (int v = 0; v < Vecs; ++v) {
    store_up_to(sums + v * kLanes, totals[v].sum, columns - v * kLanes);
  }
}

template <class T>
static void sum_columns(const ColumnSums& s, int64_t task) {
  constexpr int kVecs = 4;
  const int64_t first = task * kSumColumns;
  const int64_t last = smaller(s.columns, first + kSumColumns);
  int64_t c = first;
  const T* x = static_cast<const T*>(s.x);
  for (; c + kVecs * kLanes <= last; c += kVecs * kLanes) {
    sum_vectors<T, kVecs>(s, x + c, s.sums + c, kVecs * kLanes);
  }
  for (; c < last; c += kLanes) {
    sum_vectors<T, 1>(s, x + c, s.sums + c, last - c);
  }
}

// Columns [task * kSumColumns, ...).
static void column_sums(const ColumnSums& s, int64_t task) {
  for_float_type(s.dtype, [&]<class T>(T) { sum_columns<T>(s, task); });
}

}  // namespace
}  // namespace patchgen_fast
