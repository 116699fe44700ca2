// Copies of attention's operands into the layouts of register_tile.h, converted to 32-bit units:
// floats, or pairs of bf16 (Math::kGroup = 2) that are neighbours in the contraction.
//
//     queries  [rows][steps]                        steps = ceil(dim / group)
//     keys     [tile][steps][tile_vectors][kLanes]  lanes are keys: transposed
//     values   [key / group][columns]               lanes are dims; columns = dim rounded up
//
// Whatever lies past the last key or dim is written as 0, so that products need no masks. Strides
// of the source are free; the last dimension is contiguous.
#pragma once

#include "integers.h"
#include "register_tile.h"

namespace patchgen_fast {
namespace {

// kLanes units from `count` numbers (all of the vector's where count is large enough), else 0.
template <class Math, class Element>
PATCHGEN_FAST_INLINE Vec load_units(const Element* from, int64_t count) {
  if constexpr (Math::kGroup == 1) {
    return load_up_to(from, count);
  } else {
#if defined(__AVX512BF16__)
    const __mmask32 lanes = count >= 32 ? ~0u : (1u << count) - 1u;
    return bit_cast<Vec>(_mm512_maskz_loadu_epi16(lanes, from));
#else
    (void)from, (void)count;
    return Vec{};
#endif
  }
}

// sign is -1, 0 or 1.
template <class Math>
PATCHGEN_FAST_INLINE Vec apply_sign(Vec units, float sign) {
  if (sign > 0) {
    return units;
  }
  if constexpr (Math::kGroup == 1) {
    return units * broadcast(sign);
  } else {
    return sign == 0 ? Vec{} : bit_cast<Vec>(bit_cast<Pairs>(units) ^ 0x80008000u);
  }
}

// Rows of `dim` numbers, `stride` apart, to rows of `columns` units.
template <class Math, class Element>
void pack_rows(const Element* from, int64_t stride, int64_t rows, int64_t dim, float sign,
               float* to, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r, from += stride, to += columns) {
    for (int64_t u = 0; u < columns; u += kLanes) {
      const int64_t d = u * Math::kGroup;
      store(to + u, apply_sign<Math>(load_units<Math>(from + d, dim - d), sign));
    }
  }
}

// Rows as units one after the other: where they lie if they are that already, else packed into
// `to`.
template <class Math, class Element>
Units rows_as_units(const Element* from, int64_t stride, int64_t rows, int64_t dim, float sign,
                    float* to, int64_t columns) {
  if constexpr (sizeof(Element) * Math::kGroup == sizeof(float)) {
    const bool aligned = reinterpret_cast<uintptr_t>(from) % sizeof(float) == 0;
    if (sign > 0 && aligned && dim % Math::kGroup == 0 && stride % Math::kGroup == 0) {
      return {reinterpret_cast<const float*>(from), stride / Math::kGroup};
    }
  }
  pack_rows<Math>(from, stride, rows, dim, sign, to, columns);
  return {to, columns};
}

// kLanes keys (fewer where count is less) become one vector of each step, `step_stride` apart.
template <class Math, class Element>
PATCHGEN_FAST_INLINE void pack_key_vector(const Element* from, int64_t stride, int64_t count,
                                          int64_t dim, float* to, int64_t step_stride) {
  const int64_t steps = divide_up(dim, Math::kGroup);
  for (int64_t step = 0; step < steps; step += kLanes) {
    const int64_t d = step * Math::kGroup;
    Vec square[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      square[i] = i < count ? load_units<Math>(from + i * stride + d, dim - d) : Vec{};
    }
    transpose(square);
    if (step + kLanes <= steps) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        store(to + (step + i) * step_stride, square[i]);
      }
    } else {
      for (int i = 0; i < steps - step; ++i) {
        store(to + (step + i) * step_stride, square[i]);
      }
    }
  }
}

template <class Math, class Element>
void pack_keys(const Element* from, int64_t stride, int64_t keys, int64_t dim, float* to) {
  const int64_t steps = divide_up(dim, Math::kGroup);
  const int64_t vectors = divide_up(keys, kLanes);
  for (int64_t first = 0; first < vectors;) {
    const int64_t width = key_tile_vectors<Math>(vectors - first);
    for (int64_t v = 0; v < width; ++v) {
      const int64_t key = (first + v) * kLanes;
      pack_key_vector<Math>(from + key * stride, stride, smaller(keys - key, kLanes), dim,
                            to + v * kLanes, width * kLanes);
    }
    to += width * kLanes * steps;
    first += width;
  }
}

// Two rows of bf16 numbers, 2 * kLanes of each, as pairs: the first row's in the low halves.
struct RowPairs {
  Vec low, high;
};

PATCHGEN_FAST_INLINE RowPairs interleave(Vec first, Vec second) {
#if defined(__AVX512BF16__)
  const VecInt lane = iota(), other = lane + 2 * kLanes;
  const __m512i low = bit_cast<__m512i>(lane | (other << 16));
  const __m512i high = bit_cast<__m512i>((lane + kLanes) | ((other + kLanes) << 16));
  const __m512i a = bit_cast<__m512i>(first), b = bit_cast<__m512i>(second);
  return {bit_cast<Vec>(_mm512_permutex2var_epi16(a, low, b)),
          bit_cast<Vec>(_mm512_permutex2var_epi16(a, high, b))};
#else
  return {first, second};
#endif
}

PATCHGEN_FAST_INLINE void store_pairs(float* to, const RowPairs& pairs) {
  store(to, pairs.low);
  store(to + kLanes, pairs.high);
}

// Two rows of `dim` bf16 numbers to one of `columns` pairs; the second may be missing.
template <class Math, class Element>
PATCHGEN_FAST_INLINE void pack_row_pair(const Element* first, const Element* second, int64_t dim,
                                        float* to, int64_t columns) {
  for (int64_t d = 0; d < columns; d += 2 * kLanes) {
    const Vec upper = load_units<Math>(first + d, dim - d);
    const Vec lower = second == nullptr ? Vec{} : load_units<Math>(second + d, dim - d);
    const RowPairs pairs = interleave(upper, lower);
    if (d + kLanes < columns) {
      store_pairs(to + d, pairs);
    } else {
      store(to + d, pairs.low);
    }
  }
}

template <class Math, class Element>
void pack_values(const Element* from, int64_t stride, int64_t keys, int64_t dim, float* to,
                 int64_t columns) {
  for (int64_t key = 0; key < keys; key += Math::kGroup) {
    if constexpr (Math::kGroup == 1) {
      for (int64_t d = 0; d < columns; d += kLanes) {
        store(to + d, load_up_to(from + d, dim - d));
      }
    } else {
      pack_row_pair<Math>(from, key + 1 < keys ? from + stride : nullptr, dim, to, columns);
    }
    from += Math::kGroup * stride;
    to += columns;
  }
}

// to = from * factor, `dim` numbers rounded to Element.
template <class Element>
PATCHGEN_FAST_INLINE void store_row(Element* to, const float* from, int64_t dim, float factor) {
  int64_t d = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<Element, BFloat16>) {
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
      const Vec low = load(from + d), high = load(from + d + kLanes);
      store_bits(to + d, to_bf16(low * broadcast(factor), high * broadcast(factor)));
    }
  }
#endif
  for (; d < dim; d += kLanes) {
    store_up_to(to + d, load(from + d) * broadcast(factor), dim - d);
  }
}

}  // namespace
}  // namespace patchgen_fast
