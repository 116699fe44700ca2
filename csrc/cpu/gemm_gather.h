// Blocks of A from matrices in memory: rows as they stand, or columns, for products with the
// transpose. (patch_embed_gather.h gathers them from images.)
#pragma once

#include "gemm_pack.h"

namespace patchgen_fast {
namespace {

// Where the rows of a matrix lie: `group` rows `stride` elements apart, then the next group,
// `group_stride` after the last. Tokens behind a prefix are such a matrix, one group an image.
template <class Element>
struct RowsOf {
  const Element* first;
  int64_t stride;
  int64_t group;
  int64_t group_stride;

  const Element* row(int64_t index) const {
    return first + index / group * group_stride + index % group * stride;
  }
};

// Whether rows `stride` apart can be multiplied where they lie: whole groups of the operand at
// whole words, and not all rows of a tile in the same set of the L1 cache.
template <class Element>
PATCHGEN_FAST_INLINE bool multiplies_in_place(const void* rows, int64_t stride, int64_t depth) {
  using Operand = typename OperandFor<Element>::type;
  constexpr int64_t kAliasing = 4096 / static_cast<int64_t>(sizeof(Element));
  return kMultipliedAsStored<Element> && depth % Operand::kGroup == 0 &&
         stride % Operand::kGroup == 0 && stride % kAliasing != 0 &&
         reinterpret_cast<uintptr_t>(rows) % sizeof(Word) == 0;
}

// One row of `depth` elements; where they do not fill the last group, the rest of it is 0.
template <class Operand, class Element>
PATCHGEN_FAST_INLINE void gather_row(Word* to, const Element* from, int64_t depth) {
  if constexpr (std::is_same_v<Element, typename Operand::Element>) {
    if (depth % Operand::kGroup != 0) {
      to[depth / Operand::kGroup] = 0;
    }
    if (depth > 0) {  // an empty tensor has no address
      __builtin_memcpy(to, from, static_cast<size_t>(depth) * sizeof(Element));
    }
  } else {
    float* floats = reinterpret_cast<float*>(to);
    for (int64_t k = 0; k < depth; k += kLanes) {
      store(floats + k, load_up_to(from + k, depth - k));  // rows are padded to whole vectors
    }
  }
}

// Rows [first, first + rows).
template <class Operand, class Element>
static void gather_rows(Word* a, int64_t stride, const RowsOf<Element>& from, int64_t first,
                        int64_t rows, int64_t depth) {
  for (int64_t r = 0; r < rows; ++r) {
    gather_row<Operand>(a + r * stride, from.row(first + r), depth);
  }
}

// The same of one group, or its rows where they lie if they can be multiplied there; then `stride`
// becomes theirs.
template <class Element>
static const Word* gather_unless_in_place(Word* a, int64_t& stride, const RowsOf<Element>& from,
                                          int64_t first, int64_t rows, int64_t depth) {
  using Operand = typename OperandFor<Element>::type;
  if (multiplies_in_place<Element>(from.first, from.stride, depth)) {
    stride = from.stride / Operand::kGroup;
    return reinterpret_cast<const Word*>(from.row(first));
  }
  gather_rows<Operand>(a, stride, from, first, rows, depth);
  return a;
}

// Group `index` of kLanes columns that start at `column`, of which `left` exist: one vector of
// words. `rows` holds the addresses of the `depth` rows.
template <class Operand, class Element>
PATCHGEN_FAST_INLINE Vec load_column_group(const Element* const* rows, int64_t depth, int64_t index,
                                           int64_t column, int64_t left) {
  const int64_t row = index * Operand::kGroup;
  if (row >= depth) {
    return Vec{};
  }
  const Element* second = row + 1 < depth ? rows[row + 1] + column : nullptr;
  return load_column_words<Operand>(rows[row] + column, second, left);
}

// Columns [first, first + columns) of the `depth` rows at `rows`, as rows of `a`.
template <class Operand, class Element>
static void gather_columns(Word* a, int64_t stride, const Element* const* rows, int64_t depth,
                           int64_t first, int64_t columns) {
  const int64_t groups = divide_up(depth, Operand::kGroup);
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t left = columns - c;
    for (int64_t k = 0; k < groups; k += kLanes) {
      Vec tile[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        tile[i] = load_column_group<Operand>(rows, depth, k + i, first + c, left);
      }
      transpose(tile);
      for (int i = 0; i < kLanes && i < left; ++i) {
        store_bits(a + (c + i) * stride + k, tile[i]);  // rows are padded to whole vectors
      }
    }
  }
}

}  // namespace
}  // namespace patchgen_fast
