// A linear layer of few rows, which reads the weights where they lie.
//
//     out = activation(input @ W^T + bias) + residual
//
// A weight takes part in as many products as there are rows: the time is that of bringing it in,
// and packing would double that. Input and weights both lie along the depth, so lanes are depth: a
// tile of rows x outputs sums up vectors, and the lanes of these sums are added afterwards, kLanes
// outputs of a row at a time.
//
// A task owns some strips of kLanes outputs and all rows. The rows are gathered once, in the
// operand's format and padded with zeros, and stay in the L1 or L2 cache; a strip is read from
// memory for the first rows and from the cache for the others. While it is computed the next one
// is brought in, evenly. Bytes moved: input, weight, residual and output once.
#pragma once

#include "gemm_gather.h"
#include "gemm_kernel.h"
#include "linear_sink.h"

namespace patchgen_fast {
namespace {

// 24 sums and 4 weights in 32 registers, or 12 and 2 in 16; rows are read from memory.
constexpr int kFewTileRows = 6;
constexpr int kFewTileColumns = kRegisters == 32 ? 4 : 2;
constexpr int kFewTiles = kLanes / kFewTileColumns;  // across a strip

// Beyond so many rows the transposed product is faster, whose tiles sum no lanes, though its last
// vector of rows is rarely full; where weights have to be converted, packing them is repaid later.
// Measured (CONTRIBUTING.md).
template <class T>
constexpr int64_t kMostFewRows = kMultipliedAsStored<T> ? kLanes + kLanes / 2 : 128;

// How a tile brings in the next strip: the same rows, every `period`-th step from `phase` on.
struct StripAhead {
  int64_t elements;  // from a row of this strip to that of the next
  int64_t period;
  int64_t phase;
};

constexpr StripAhead kNothingAhead{0, INT64_MAX, INT64_MAX};

// One vector of each of Rows rows times the same of kFewTileColumns weight rows, of whose elements
// `left` exist.
template <class Operand, int Rows, class Element>
PATCHGEN_FAST_INLINE void few_rows_step(Vec (&acc)[Rows][kFewTileColumns], const Word* a,
                                        int64_t stride, const Element* const* weights, int64_t k,
                                        int64_t left) {
  Vec w[kFewTileColumns];
#pragma GCC unroll 4
  for (int c = 0; c < kFewTileColumns; ++c) {
    w[c] = load_groups<Operand>(weights[c] + k, left);
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const Vec x = load_words(a + r * stride + k / Operand::kGroup);
#pragma GCC unroll 4
    for (int c = 0; c < kFewTileColumns; ++c) {
      acc[r][c] = Operand::multiply_add(acc[r][c], x, w[c]);
    }
  }
}

// Sums of Rows rows and kFewTileColumns outputs to sums[row * kFewTiles], with the first part of
// join_lanes done. Long sums are cut into runs, as in gemm_tile.h.
template <class Operand, int Rows, class Element>
static void few_rows_tile(const Word* a, int64_t stride, const Element* const* weight_rows,
                          int64_t depth, StripAhead ahead, Vec* sums) {
  constexpr int64_t kStep = kLanes * Operand::kGroup;
  const Element* weights[kFewTileColumns];
#pragma GCC unroll 4
  for (int c = 0; c < kFewTileColumns; ++c) {
    weights[c] = weight_rows[c];
  }
  int64_t k = 0;
  do {
    const bool first = k == 0;
    const int64_t end = smaller(depth, k + Operand::kRun * kStep);
    Vec acc[Rows][kFewTileColumns] = {};
    for (; k + kStep <= end; k += kStep) {
      if (ahead.phase-- == 0) {
        ahead.phase += ahead.period;
#pragma GCC unroll 4
        for (int c = 0; c < kFewTileColumns; ++c) {
          __builtin_prefetch(weights[c] + ahead.elements + k, 0, 2);
        }
      }
      few_rows_step<Operand>(acc, a, stride, weights, k, kStep);
    }
    if (k < end) {
      few_rows_step<Operand>(acc, a, stride, weights, k, end - k);
      k = end;
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec joined = join_lanes<1>(acc[r]);
      Vec& sum = sums[r * kFewTiles];
      sum = first ? joined : sum + joined;
    }
  } while (k < depth);
}

template <class Operand, class Element, int... R>
constexpr auto few_rows_tiles(std::integer_sequence<int, R...>) {
  using Tile = void (*)(const Word*, int64_t, const Element* const*, int64_t, StripAhead, Vec*);
  struct Tiles {
    Tile of_rows[sizeof...(R)];
  };
  return Tiles{{few_rows_tile<Operand, R + 1, Element>...}};
}

// All rows of the strip at `column`, in tiles of even height; then, if `more`, comes another.
template <class T>
static void few_rows_strip(const LinearForward& f, const FewRowsPlan& plan, const Word* a,
                           int64_t column, bool more, const LinearSink<T>& sink) {
  using Operand = typename OperandFor<T>::type;
  static constexpr auto tiles =
      few_rows_tiles<Operand, T>(std::make_integer_sequence<int, kFewTileRows>{});
  const int64_t columns = smaller(f.columns - column, kLanes);
  const T* weights[kLanes];
  for (int64_t c = 0; c < kLanes; ++c) {  // past the last column the last one again
    const int64_t weight_row = column + smaller(c, columns - 1);
    weights[c] = static_cast<const T*>(f.weight) + weight_row * f.weight_stride;
  }
  const int64_t tile_count = divide_up(f.rows, kFewTileRows);
  for (int64_t t = 0; t < tile_count; ++t) {
    const int64_t row = f.rows * t / tile_count;
    const int64_t rows = f.rows * (t + 1) / tile_count - row;
    const StripAhead ahead =
        more ? StripAhead{kLanes * f.weight_stride, tile_count, t} : kNothingAhead;
    Vec sums[kFewTileRows][kFewTiles];
    if (columns < kLanes) {
      __builtin_memset(sums, 0, sizeof(sums));  // not all outputs are computed
    }
    for (int64_t c = 0; c < columns; c += kFewTileColumns) {
      tiles.of_rows[rows - 1](a + row * plan.stride, plan.stride, weights + c, f.depth, ahead,
                              &sums[0][c / kFewTileColumns]);
    }
    Vec outputs[kFewTileRows];
    for (int64_t r = 0; r < rows; ++r) {
      outputs[r] = join_lanes<kFewTileColumns>(sums[r]);
    }
    sink.put_tile(outputs, static_cast<int>(rows), 1, row, column);
  }
}

// All rows in the operand's format, with zeros up to whole vectors.
template <class T>
static void gather_few_rows(const LinearForward& f, const FewRowsPlan& plan, Word* a) {
  using Operand = typename OperandFor<T>::type;
  const int64_t whole = f.depth / (kLanes * Operand::kGroup) * kLanes;
  for (int64_t r = 0; r < f.rows && whole * Operand::kGroup < f.depth; ++r) {
    store_bits(a + r * plan.stride + whole, Vec{});
  }
  const RowsOf<T> input{static_cast<const T*>(f.input), f.input_stride, f.rows, 0};
  gather_rows<Operand>(a, plan.stride, input, 0, f.rows, f.depth);
}

template <class T>
static void multiply_few_rows(const LinearForward& f, const FewRowsPlan& plan, int64_t task,
                              void* scratch) {
  Word* a = static_cast<Word*>(scratch);
  gather_few_rows<T>(f, plan, a);
  const int64_t first = task * plan.columns_per_task;
  const int64_t last = smaller(f.columns, first + plan.columns_per_task);
  float* bias = reinterpret_cast<float*>(a + f.rows * plan.stride);
  widen_bias<T>(f, first, last, bias);
  const LinearSink<T> sink = sink_of<T>(f, bias);
  for (int64_t column = first; column < last; column += kLanes) {
    few_rows_strip(f, plan, a, column, column + kLanes < last, sink);
  }
}

template <class T>
static FewRowsPlan plan_few_rows(const LinearForward& f, int64_t threads) {
  FewRowsPlan plan{};
  const bool empty = f.rows == 0 || f.columns == 0 || f.depth == 0;
  if (f.depth_major || f.rows > kMostFewRows<T> || empty) {
    return plan;
  }
  const int64_t strips = divide_up(f.columns, kLanes);
  const int64_t workers =
      smaller(strips, worthwhile_threads(f.rows * f.columns * f.depth, threads));
  plan.columns_per_task = divide_up(strips, workers) * kLanes;
  plan.tasks = divide_up(f.columns, plan.columns_per_task);
  plan.stride = block_stride(divide_up(f.depth, OperandFor<T>::type::kGroup));
  plan.scratch_bytes = static_cast<size_t>(f.rows * plan.stride + strips * kLanes) * sizeof(Word);
  return plan;
}

// -- the kernel table's entries -------------------------------------------------------------------

static FewRowsPlan linear_few_rows_plan(const LinearForward& f, int64_t threads) {
  return for_float_type(f.dtype, [&]<class T>(T) { return plan_few_rows<T>(f, threads); });
}

static void linear_few_rows(const LinearForward& f, const FewRowsPlan& plan, int64_t task,
                            void* scratch) {
  for_float_type(f.dtype, [&]<class T>(T) { multiply_few_rows<T>(f, plan, task, scratch); });
}

}  // namespace
}  // namespace patchgen_fast
