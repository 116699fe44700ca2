// Scores to probabilities, in place, for a few rows at a time.
//
//     m' = max(m, max_j s_j)    p_j = 2^((s_j - m') * factor)    l' = sum_j p_j
//
// `factor` is log2(e), times the scale where no additive mask has already made the scores final.
// Scores at -inf give p = 0 whatever the maximum is, so a row that sees no key ends with l = 0 and
// m = -inf, never with NaN; NaN in the input stays NaN. With PairMath the probabilities are written
// as bf16 over the first half of their row; the sum is that of the unrounded ones.
#pragma once

#include "attention.h"
#include "attention_pack.h"

namespace patchgen_fast {
namespace {

constexpr float kMinusInfinity = -__builtin_huge_valf();
constexpr float kLog2e = 1.44269504088896340736f;

// Scores from `limit` on belong to keys that the row does not see.
PATCHGEN_FAST_INLINE void hide_keys_from(float* scores, int64_t limit, int64_t vectors) {
  int64_t v = limit / kLanes;
  if (v < vectors && limit % kLanes != 0) {
    const VecInt seen = iota() < broadcast_int(static_cast<int32_t>(limit % kLanes));
    store(scores + v * kLanes, select(seen, load(scores + v * kLanes), broadcast(kMinusInfinity)));
    ++v;
  }
  for (; v < vectors; ++v) {
    store(scores + v * kLanes, broadcast(kMinusInfinity));
  }
}

template <class Element>
PATCHGEN_FAST_INLINE Vec load_strided(const Element* from, int64_t stride, int64_t count) {
  if (stride == 1) {
    return load_up_to(from, count);
  }
  Vec lanes{};
  for (int i = 0; i < smaller(count, kLanes); ++i) {
    lanes[i] = load_one(from + i * stride);
  }
  return lanes;
}

// One row of a mask onto one row of scores. Additive: scores * scale + mask.
template <class Element>
PATCHGEN_FAST_INLINE void apply_mask_row(float* scores, int64_t keys, const Element* mask,
                                         int64_t stride, float scale) {
  constexpr bool kBoolean = sizeof(Element) == 1;
  for (int64_t j = 0; j < keys; j += kLanes) {
    const Vec value = load_strided(mask + j * stride, stride, keys - j);
    const Vec score = load(scores + j);
    store(scores + j, kBoolean ? select(value != 0.0f, score, broadcast(kMinusInfinity))
                               : fma(score, broadcast(scale), value));
  }
}

// The mask of queries [query, query + rows) and keys [key, key + keys) onto their scores.
template <class Element>
void apply_mask_as(float* scores, int64_t score_row, int64_t rows, int64_t keys,
                   const AttentionMask& mask, int64_t first, float scale) {
  const Element* row = static_cast<const Element*>(mask.data) + first;
  for (int64_t r = 0; r < rows; ++r, row += mask.query, scores += score_row) {
    apply_mask_row(scores, keys, row, mask.key, scale);
  }
}

inline void apply_mask(float* scores, int64_t score_row, int64_t rows, int64_t keys,
                       const AttentionMask& mask, int64_t first, float scale) {
  switch (mask.dtype) {
    case Dtype::float32:
      return apply_mask_as<float>(scores, score_row, rows, keys, mask, first, scale);
    case Dtype::bfloat16:
      return apply_mask_as<BFloat16>(scores, score_row, rows, keys, mask, first, scale);
    case Dtype::float16:
      return apply_mask_as<Float16>(scores, score_row, rows, keys, mask, first, scale);
    default:
      return apply_mask_as<uint8_t>(scores, score_row, rows, keys, mask, first, scale);
  }
}

// `row[j ...]` as floats, or over the first half of the row as bf16.
template <class Math, int kVectors>
PATCHGEN_FAST_INLINE void store_probabilities(float* row, int64_t j, const Vec* p) {
  if constexpr (Math::kGroup == 1) {
    store(row + j, *p);
  } else if constexpr (kVectors == 1) {
    store_bits(row + j / 2, to_bf16(*p));
  } else {
#if defined(__AVX512BF16__)
    store(row + j / 2, to_bf16(p[0], p[1]));
#endif
  }
}

// Scores of kVectors vectors and kRows rows to probabilities, which are added to the rows' sums.
template <class Math, int kRows, int kVectors>
PATCHGEN_FAST_INLINE void weigh(float* scores, int64_t score_row, const Vec* center, float factor,
                                int64_t vector, Vec* sums) {
  const int64_t j = vector * kLanes;
  Vec p[kRows * kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows * kVectors; ++i) {
    const int r = i / kVectors, v = i % kVectors;
    p[i] = load(scores + r * score_row + j + v * kLanes) - center[r];
  }
  exp2_scaled<Math::kExpDegree>(p, broadcast(factor));
#pragma GCC unroll 8
  for (int i = 0; i < kRows * kVectors; ++i) {
    sums[i / kVectors] += p[i];
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    store_probabilities<Math, kVectors>(scores + r * score_row, j, p + r * kVectors);
  }
}

// kRows rows at once, so that the lane reductions of one row hide behind another's arithmetic.
// Updates maxima, and sets sums to those of these keys alone.
template <class Math, int kRows>
void softmax_rows(float* scores, int64_t score_row, int64_t vectors, float factor, float* maxima,
                  float* sums) {
  Vec top[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    top[r] = broadcast(maxima[r]);
  }
  for (int64_t v = 0; v < vectors; ++v) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      top[r] = max(load(scores + r * score_row + v * kLanes), top[r]);
    }
  }
  Vec center[kRows];
  Vec sum[kRows] = {};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    maxima[r] = max_lanes(top[r]);
    center[r] = broadcast(maxima[r] == kMinusInfinity ? 0.0f : maxima[r]);
  }
  int64_t v = 0;
  for (; v + Math::kGroup <= vectors; v += Math::kGroup) {
    weigh<Math, kRows, Math::kGroup>(scores, score_row, center, factor, v, sum);
  }
  for (; v < vectors; ++v) {
    weigh<Math, kRows, 1>(scores, score_row, center, factor, v, sum);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    sums[r] = sum_lanes(sum[r]);
  }
}

template <class Math>
void softmax_block(float* scores, int64_t score_row, int64_t rows, int64_t vectors, float factor,
                   float* maxima, float* sums) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    softmax_rows<Math, 4>(scores + r * score_row, score_row, vectors, factor, maxima + r, sums + r);
  }
  for (; r < rows; ++r) {
    softmax_rows<Math, 1>(scores + r * score_row, score_row, vectors, factor, maxima + r, sums + r);
  }
}

// Natural logarithm of sum exp(score), from the maximum of the scores times `to_natural` and the
// sum.
PATCHGEN_FAST_INLINE Vec log_sum_exp(Vec maximum, Vec sum, float to_natural) {
  const Vec lse = add_log(maximum * broadcast(to_natural), sum);
  return select(sum == 0.0f, broadcast(kMinusInfinity), lse);
}

}  // namespace
}  // namespace patchgen_fast
