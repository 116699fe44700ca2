// A linear layer of a few hundred rows at most, for which packing the weights would not pay: the
// transposed product, with the input packed and the weights read once, where they lie.
//
//     out^T = W @ input^T
//
// W takes the place of A in gemm_kernel.h, the input that of W. A task owns some columns of `out`
// and all its rows. It takes the columns in strips; while one is multiplied, the weights of the
// next are brought in. Finished tiles are transposed through a buffer in L1. Bytes moved: weight,
// input, residual and output once, and the input again, packed.
#pragma once

#include "gemm_gather.h"
#include "gemm_kernel.h"
#include "linear_sink.h"

namespace patchgen_fast {
namespace {

// Columns of `out` in a strip: whole vectors and, with 32 registers, whole tiles.
constexpr int64_t kStripColumns = 16;

// Takes tiles of out^T, whose rows are columns of `out`, and hands on what they are of `out` when a
// strip is complete.
template <class T>
struct TransposingSink {
  LinearSink<T> to;
  float* strip;            // [kStripColumns][kPanelColumns]
  int64_t first, columns;  // of the task
  int64_t rows;

  // Each row of a tile fetches its share of the lines that the strip goes to.
  template <int Vecs>
  PATCHGEN_FAST_INLINE_MEMBER void expect(int64_t column, int64_t row) const {
    constexpr int64_t kShare = divide_up(Vecs * kLanes, kStripColumns);
    const int64_t within = column % kStripColumns;
    for (int64_t r = 0; r < kShare; ++r) {
      to.template expect<1>(row + within * kShare + r, first + column - within);
    }
  }

  template <int Columns, int Vecs>
  PATCHGEN_FAST_INLINE_MEMBER void put(const Vec (&acc)[Columns][Vecs], int64_t column,
                                       int64_t row) const {
    const int64_t within = column % kStripColumns;
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) {
        store(strip + (within + c) * kPanelColumns + v * kLanes, acc[c][v]);
      }
    }
    if (within + Columns == kStripColumns || column + Columns == columns) {
      put_strip(column - within, row, Vecs);
    }
  }

  __attribute__((noinline)) void put_strip(int64_t column, int64_t row, int vecs) const {
    const int64_t end = smaller(columns, column + kStripColumns);
    for (int64_t c = column; c < end; c += kLanes) {
      for (int64_t r = row; r < smaller(rows, row + vecs * kLanes); r += kLanes) {
        const float* from = strip + (c - column) * kPanelColumns + (r - row);
        Vec tile[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          tile[i] = load(from + i * kPanelColumns);
        }
        transpose(tile);
        to.put_tile(tile, static_cast<int>(smaller(kLanes, rows - r)), 1, r, first + c);
      }
    }
  }
};

// Beyond so many rows, packing the weights is repaid, whose tiles end more simply. Weights that
// have to be converted are packed at any number. Measured (CONTRIBUTING.md).
constexpr int64_t kMostTransposedRows = 20 * kLanes;

template <class T>
PATCHGEN_FAST_INLINE bool suits_transposed(const LinearForward& f) {
  return kMultipliedAsStored<T> && !f.depth_major && f.rows <= kMostTransposedRows &&
         f.rows * f.columns > 0;
}

template <class T>
static GemmPlan plan_transposed(const LinearForward& f, int64_t threads) {
  GemmPlan plan = plan_gemm<typename OperandFor<T>::type>(
      f.columns, f.rows, f.depth, worthwhile_threads(f.rows * f.columns * f.depth, threads), 0,
      true);
  plan.transposed = true;
  plan.rows_per_task = round_up(plan.rows_per_task, kStripColumns);
  plan.tasks = divide_up(plan.rows, plan.rows_per_task);
  plan.rows_at_once = kStripColumns;
  plan.scratch_bytes =
      static_cast<size_t>(kStripColumns * kPanelColumns + round_up(f.columns, kStripColumns) +
                          plan.rows_per_task * plan.stride) *
      sizeof(Word);
  return plan;
}

template <class T>
static void pack_input(const LinearForward& f, const GemmPlan& plan, int64_t panel) {
  const int64_t row = panel_column(plan, panel);
  pack_rows<typename OperandFor<T>::type>(
      static_cast<Word*>(f.packed) + panel_offset(plan, panel), plan, row,
      static_cast<const T*>(f.input) + row * f.input_stride, f.input_stride);
}

template <class T>
static void multiply_transposed(const LinearForward& f, GemmPlan plan, int64_t task,
                                void* scratch) {
  using Operand = typename OperandFor<T>::type;
  const GemmTask t = gemm_task(plan, task);
  float* strip = static_cast<float*>(scratch);
  float* bias = strip + kStripColumns * kPanelColumns;
  Word* gathered = reinterpret_cast<Word*>(bias + round_up(f.columns, kStripColumns));
  widen_bias<T>(f, t.first_row, t.first_row + t.rows, bias);
  const RowsOf<T> weights{static_cast<const T*>(f.weight), f.weight_stride, plan.rows, 0};
  const Word* a =
      gather_unless_in_place(gathered, plan.stride, weights, t.first_row, t.rows, f.depth);
  const TransposingSink<T> transposing{sink_of<T>(f, bias), strip, t.first_row, t.rows,
                                       plan.columns};
  multiply_block<Operand>(plan, t, a, static_cast<const Word*>(f.packed), a == gathered,
                          transposing);
}

}  // namespace
}  // namespace patchgen_fast
