// Packing W into panels of kPanelColumns columns of C, as the register tile reads them.
//
//     panel[k][column] = the k-th 32-bit group of W's row `column`; 0 where W has no such row
//
// One task packs one panel: W is read once and written once, in tiles of kLanes x kLanes words that
// are transposed in registers. The last panel is as wide as its columns need, in whole vectors.
// `pack_rows` takes W as [columns, depth], `pack_columns` as [depth, columns] (for products with
// the transpose, where nothing has to be transposed).
#pragma once

#include <type_traits>

#include "gemm.h"
#include "gemm_tile.h"
#include "integers.h"

namespace patchgen_fast {
namespace {

// A panel is kTileVecs vectors wide; where one vector would be left for the last, the two last
// share theirs evenly: a tile of one vector waits for its sums.
constexpr bool kSharesVectors = kTileVecs > 2;

PATCHGEN_FAST_INLINE int64_t last_panel_column(int64_t columns, int64_t panels) {
  const bool shares = kSharesVectors && panels > 1 && divide_up(columns, kLanes) % kTileVecs == 1;
  return (panels - 1) * kPanelColumns - (shares ? kLanes : 0);
}

PATCHGEN_FAST_INLINE int64_t panel_column(const GemmPlan& plan, int64_t panel) {
  return panel + 1 < plan.panels ? panel * kPanelColumns : plan.last_column;
}

// Vectors of the panel that starts at `column`.
PATCHGEN_FAST_INLINE int64_t panel_vecs(const GemmPlan& plan, int64_t column) {
  const int64_t left = divide_up(plan.columns - column, kLanes);
  return kSharesVectors && left == kTileVecs + 1 ? kTileVecs - 1 : smaller(left, kTileVecs);
}

PATCHGEN_FAST_INLINE int64_t panel_offset(const GemmPlan& plan, int64_t panel) {
  return panel_column(plan, panel) * plan.groups;
}

// Where the bias lies behind the panels, as floats, padded with zeros to whole panels.
PATCHGEN_FAST_INLINE int64_t bias_offset(const GemmPlan& plan) {
  return plan.panels * kPanelColumns * plan.groups;
}

// kLanes groups from `from`, of which the first `count` elements exist.
template <class Operand, class Element>
PATCHGEN_FAST_INLINE Vec load_groups(const Element* from, int64_t count) {
  if constexpr (Operand::kGroup == 1) {
    return load_up_to(from, count);
  } else {
    return load_pairs_up_to(from, count);
  }
}

// Packing fetches the rows after the next kLanes, in the order of their addresses: hardware does
// not follow so many rows at once.
constexpr int64_t kPackAheadBytes = 4096;

// One vector of columns: rows `w`, w + ld, ... (`rows` of them exist) to panel[k * width].
template <class Operand, class Element>
static void pack_vector(Word* panel, int64_t width, const Element* w, int64_t ld, int64_t rows,
                        int64_t depth) {
  constexpr int64_t kStep = kLanes * Operand::kGroup;
  const char* ahead = reinterpret_cast<const char*>(w + kLanes * ld) + kPackAheadBytes;
  for (int64_t first = 0; first < depth; first += kStep) {
    const int64_t left = depth - first;
    Vec tile[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      tile[r] = r < rows ? load_groups<Operand>(w + r * ld + first, left) : Vec{};
      __builtin_prefetch(ahead);
      ahead += kStep * sizeof(Element);
    }
    transpose(tile);
    const int64_t groups = smaller(divide_up(left, Operand::kGroup), kLanes);
    for (int k = 0; k < groups; ++k) {
      store_bits(panel + k * width, tile[k]);
    }
    panel += kLanes * width;
  }
}

// The panel of W[columns, depth] that starts at `column`; `w` points to that row, rows are `ld`
// apart.
template <class Operand, class Element>
static void pack_rows(Word* panel, const GemmPlan& plan, int64_t column, const Element* w,
                      int64_t ld) {
  const int64_t vecs = panel_vecs(plan, column);
  for (int64_t v = 0; v < vecs; ++v) {
    const int64_t rows = smaller(plan.columns - column - v * kLanes, kLanes);
    pack_vector<Operand>(panel + v * kLanes, vecs * kLanes, w + v * kLanes * ld, ld, rows,
                         plan.depth);
  }
}

// The elements of one row of W[depth, columns] as words: kLanes columns, of which `left` exist. A
// group of two takes the second element from the row below, `second`; null is a row of zeros.
template <class Operand, class Element>
PATCHGEN_FAST_INLINE Vec load_column_words(const Element* from, const Element* second,
                                           int64_t left) {
  if constexpr (Operand::kGroup == 1) {
    return load_up_to(from, left);
  } else {
    const Half low = load_half_up_to(from, left);
    const Half high = second != nullptr ? load_half_up_to(second, left) : Half{};
    return bit_cast<Vec>(convert_to_32(low) | (convert_to_32(high) << 16));
  }
}

// The panel of W[depth, columns] that starts at `column`, from its group `first_group` on: `depth`
// rows, `ld` apart; `w` points to the first of them, at column 0.
template <class Operand, class Element>
static void pack_columns(Word* panel, const GemmPlan& plan, int64_t column, int64_t first_group,
                         const Element* w, int64_t ld, int64_t depth) {
  const int64_t vecs = panel_vecs(plan, column);
  Word* to = panel + first_group * vecs * kLanes;
  for (int64_t k = 0; k < depth; k += Operand::kGroup) {
    const Element* row = w + k * ld + column;
    const Element* second = k + 1 < depth ? row + ld : nullptr;
    for (int64_t v = 0; v < vecs; ++v, to += kLanes) {
      const int64_t at = v * kLanes;
      store_bits(to, load_column_words<Operand>(row + at, second == nullptr ? second : second + at,
                                                plan.columns - column - at));
    }
  }
}

// The bias of the panel that starts at `column`, as floats; zeros where there is none.
template <class Element>
static void pack_bias(float* to, const GemmPlan& plan, int64_t column, const Element* bias) {
  const int64_t vecs = panel_vecs(plan, column);
  for (int64_t v = 0; v < vecs; ++v) {
    const int64_t first = column + v * kLanes;
    const int64_t left = plan.columns - first;
    const bool present = bias != nullptr && left > 0;
    store(to + v * kLanes, present ? load_up_to(bias + first, left) : Vec{});
  }
}

}  // namespace
}  // namespace patchgen_fast
