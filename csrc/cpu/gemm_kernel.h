// The loops around the register tile: how a product is cut into tasks, and what one task does.
//
// A task owns one block of A (up to 256 KiB, in L2) and a range of panels of W. For each panel it
// walks down the block's tiles, so a panel is read from L3 once a task and then stays in L2. Where
// all of W fits there, it finishes eight rows before it goes on: then C is written as a stream.
#pragma once

#include "gemm_pack.h"
#include "gemm_sink.h"

namespace patchgen_fast {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;
constexpr int64_t kMostRows = 96;
constexpr int64_t kFewestRows = 48;  // below, the panels come from L3 too often
constexpr int64_t kStayingBytes = 384 << 10;

// An odd number of cache lines from row to row, or the rows of a tile share a few sets of L1.
PATCHGEN_FAST_INLINE int64_t block_stride(int64_t groups) {
  const int64_t lines = divide_up(groups, kWordsPerLine);
  return (lines | 1) * kWordsPerLine;
}

PATCHGEN_FAST_INLINE int64_t most_tiles(int64_t stride) {
  int64_t rows = kBlockBytes / (stride * static_cast<int64_t>(sizeof(Word)));
  rows = rows < kFewestRows ? kFewestRows : smaller(rows, kMostRows);
  return rows / kTileRows;
}

// Threads among which a product of so many multiplications is shared, each getting at least
// kLeastTask: about 3 us of a core, near what waking one costs. Reckoned, not measured.
constexpr int64_t kLeastTask = 128 << 10;

PATCHGEN_FAST_INLINE int64_t worthwhile_threads(int64_t multiplications, int64_t threads) {
  return smaller(threads, larger(1, multiplications / kLeastTask));
}

struct Split {
  int64_t row_tasks;
  int64_t column_tasks;
};

// Tiles x panels that the busiest thread works through; gathering costs about as much as a panel.
PATCHGEN_FAST_INLINE int64_t longest_work(Split split, int64_t tiles, int64_t panels,
                                          int64_t threads) {
  const int64_t a_task =
      divide_up(tiles, split.row_tasks) * (divide_up(panels, split.column_tasks) + 1);
  return divide_up(split.row_tasks * split.column_tasks, threads) * a_task;
}

// Blocks of rows; as many as make the threads' shares even, and columns cut only where rows are
// few.
static Split split_work(int64_t tiles, int64_t block_tiles, int64_t panels,
                        int64_t most_column_tasks, int64_t threads) {
  const int64_t fewest = divide_up(tiles, block_tiles);
  Split best{fewest, 1};
  if (tiles == 0 || threads <= 1 || fewest >= 8 * threads) {
    return best;
  }
  int64_t least = longest_work(best, tiles, panels, threads);
  most_column_tasks = smaller(most_column_tasks, threads);
  for (int64_t column_tasks = 1; column_tasks <= most_column_tasks; ++column_tasks) {
    const int64_t rounds = divide_up(fewest * column_tasks, threads);
    const int64_t row_tasks = smaller(tiles, rounds * threads / column_tasks);
    if (row_tasks < fewest) {
      continue;
    }
    const Split split{row_tasks, column_tasks};
    const int64_t work = longest_work(split, tiles, panels, threads);
    if (work < least) {
      least = work;
      best = split;
    }
  }
  return best;
}

// `extra_bytes_per_row`: of a task's scratch, beside the block of A. `whole_rows`: a task owns all
// columns of its rows, even where that leaves threads idle.
template <class Operand>
static GemmPlan plan_gemm(int64_t rows, int64_t columns, int64_t depth, int64_t threads,
                          size_t extra_bytes_per_row, bool whole_rows = false) {
  GemmPlan plan{};
  plan.rows = rows;
  plan.columns = columns;
  plan.depth = depth;
  plan.groups = divide_up(depth, Operand::kGroup);
  plan.stride = block_stride(plan.groups);
  plan.panels = divide_up(columns, kPanelColumns);
  plan.last_column = last_panel_column(columns, plan.panels);
  plan.pack_tasks = plan.panels;
  const int64_t tiles = divide_up(rows, kTileRows);
  const Split split = split_work(tiles, most_tiles(plan.stride), plan.panels,
                                 whole_rows ? 1 : plan.panels, threads);
  plan.rows_per_task = divide_up(tiles, split.row_tasks > 0 ? split.row_tasks : 1) * kTileRows;
  plan.panels_per_task = divide_up(plan.panels, split.column_tasks);
  plan.column_tasks = plan.panels > 0 ? divide_up(plan.panels, plan.panels_per_task) : 0;
  plan.tasks = rows > 0 ? divide_up(rows, plan.rows_per_task) * plan.column_tasks : 0;
  const int64_t packed_words = (plan.groups + 1) * plan.panels * kPanelColumns;  // + 1: the bias
  plan.packed_bytes = static_cast<size_t>(packed_words) * sizeof(Word);
  plan.rows_at_once = plan.packed_bytes <= static_cast<size_t>(kStayingBytes) ? kTileRows : 0;
  plan.scratch_bytes = static_cast<size_t>(plan.rows_per_task) *
                       (static_cast<size_t>(plan.stride) * sizeof(Word) + extra_bytes_per_row);
  return plan;
}

struct GemmTask {
  int64_t first_row;
  int64_t rows;
  int64_t first_panel;
  int64_t panels;
};

PATCHGEN_FAST_INLINE GemmTask gemm_task(const GemmPlan& plan, int64_t task) {
  GemmTask t;
  t.first_row = task / plan.column_tasks * plan.rows_per_task;
  t.rows = smaller(plan.rows - t.first_row, plan.rows_per_task);
  t.first_panel = task % plan.column_tasks * plan.panels_per_task;
  t.panels = smaller(plan.panels - t.first_panel, plan.panels_per_task);
  return t;
}

// `rows` rows from `row` on, against one panel: whole tiles, then what is left in smaller ones.
template <class Operand, int Vecs, class Sink, class Next, int Rows = kTileRows>
PATCHGEN_FAST_INLINE void multiply_rows(const GemmPlan& plan, const Word* a, int64_t row,
                                        int64_t rows, const Word* panel, int64_t column,
                                        const Sink& sink, Next ahead) {
  for (; rows >= Rows; rows -= Rows, row += Rows) {
    gemm_tile<Operand, Rows, Vecs>(a + row * plan.stride, plan.stride, panel, plan.groups, sink,
                                   row, column, ahead);
    ahead.skip(plan.groups);
  }
  if constexpr (Rows > 1) {
    if (rows > 0) {
      multiply_rows<Operand, Vecs, Sink, Next, (Rows > 4 ? 4 : Rows / 2)>(plan, a, row, rows, panel,
                                                                          column, sink, ahead);
    }
  }
}

template <class Operand, class Sink, class Next>
static void multiply_panel(const GemmPlan& plan, const Word* a, int64_t row, int64_t rows,
                           const Word* packed, int64_t panel_index, Next ahead, const Sink& sink) {
  const Word* panel = packed + panel_offset(plan, panel_index);
  const int64_t column = panel_column(plan, panel_index);
  switch (panel_vecs(plan, column)) {
    case 1:
      return multiply_rows<Operand, 1>(plan, a, row, rows, panel, column, sink, ahead);
    case 2:
      return multiply_rows<Operand, 2>(plan, a, row, rows, panel, column, sink, ahead);
    default:
      return multiply_rows<Operand, kTileVecs>(plan, a, row, rows, panel, column, sink, ahead);
  }
}

// Rows of A's block that are multiplied with all panels, one after the other.
template <class Operand, class Sink>
static void multiply_rows_at_once(const GemmPlan& plan, const GemmTask& t, const Word* a,
                                  const Word* packed, bool in_cache, const Sink& sink) {
  constexpr int64_t kWordBytes = sizeof(Word);
  const int64_t step = plan.rows_at_once;
  const int64_t share = divide_up(step * plan.stride, t.panels);
  const int64_t tiles = divide_up(step, kTileRows);
  const int64_t ahead_step = divide_up(share * kWordBytes, larger(1, plan.groups * tiles));
  for (int64_t row = 0; row < t.rows; row += step) {
    const int64_t rows = smaller(t.rows - row, step);
    const Word* next = a + (row + step) * plan.stride;
    for (int64_t panel = t.first_panel; panel < t.first_panel + t.panels; ++panel) {
      if (in_cache) {
        multiply_panel<Operand>(plan, a, row, rows, packed, panel, NothingAhead{}, sink);
      } else {
        const Ahead ahead{reinterpret_cast<const char*>(next), ahead_step};
        multiply_panel<Operand>(plan, a, row, rows, packed, panel, ahead, sink);
        next += share;
      }
    }
  }
}

// The block `a` of task `t` against its panels; `in_cache`: it was copied there. Where all panels
// stay in L2, a few rows are multiplied with every panel before the next, which these bring in.
// Otherwise each panel brings in the next one, the last that with which the next block begins.
template <class Operand, class Sink>
static void multiply_block(const GemmPlan& plan, const GemmTask& t, const Word* a,
                           const Word* packed, bool in_cache, const Sink& sink) {
  if (plan.rows_at_once > 0) {
    return multiply_rows_at_once<Operand>(plan, t, a, packed, in_cache, sink);
  }
  constexpr int64_t kGroupBytes = kPanelColumns * static_cast<int64_t>(sizeof(Word));
  const int64_t ahead_step = divide_up(kGroupBytes, divide_up(t.rows, kTileRows));
  for (int64_t p = 0; p < t.panels; ++p) {
    const int64_t next = t.first_panel + (p + 1 < t.panels ? p + 1 : 0);
    const Ahead ahead{reinterpret_cast<const char*>(packed + panel_offset(plan, next)), ahead_step};
    multiply_panel<Operand>(plan, a, 0, t.rows, packed, t.first_panel + p, ahead, sink);
  }
}

}  // namespace
}  // namespace patchgen_fast
