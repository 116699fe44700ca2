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
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      store(row + j + v * kLanes, p[v]);
    }
  } else if constexpr (kVectors == 1) {
    store_bits(row + j / 2, to_bf16(*p));
  } else {
#if defined(__AVX512BF16__)
    store(row + j / 2, to_bf16(p[0], p[1]));
#endif
  }
}

// Scores of some rows, `row` floats apart. The maxima of the first `raised` vectors are known
// already, lane by lane.
struct Scores {
  float* data;
  int64_t row, vectors;
  const float* lane_maxima = nullptr;  // kLanes of each row
  int64_t raised = 0;

  Scores at(int64_t r) const {
    return {data + r * row, row, vectors, raised > 0 ? lane_maxima + r * kLanes : nullptr, raised};
  }
};

// The largest scores of kRows rows, joined with what `maxima` holds.
template <int kRows>
PATCHGEN_FAST_INLINE void raise_maxima(const Scores& scores, float* maxima) {
  Vec top[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Vec before = broadcast(maxima[r]);
    top[r] = scores.raised > 0 ? max(load(scores.lane_maxima + r * kLanes), before) : before;
  }
  for (int64_t v = scores.raised; v < scores.vectors; ++v) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      top[r] = max(load(scores.data + r * scores.row + v * kLanes), top[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    maxima[r] = max_lanes(top[r]);
  }
}

// kRows rows of scores on their way to probabilities.
template <class Math, int kRows>
struct RowsToWeigh {
  float* scores;
  int64_t score_row;
  Vec factor, center[kRows], sum[kRows];

  PATCHGEN_FAST_INLINE_MEMBER RowsToWeigh(float* scores, int64_t score_row, const float* maxima,
                                          float factor)
      : scores(scores), score_row(score_row), factor(broadcast(factor)), sum{} {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      center[r] = broadcast(maxima[r] == kMinusInfinity ? 0.0f : maxima[r]);
    }
  }

  template <int kVectors>
  PATCHGEN_FAST_INLINE_MEMBER Exponents<kRows * kVectors> exponents(int64_t vector) const {
    Vec x[kRows * kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows * kVectors; ++i) {
      const int r = i / kVectors, v = i % kVectors;
      x[i] = load(scores + r * score_row + (vector + v) * kLanes) - center[r];
    }
    return split_exponents(x, factor);
  }

  template <int kVectors>
  PATCHGEN_FAST_INLINE_MEMBER void weigh(const Exponents<kRows * kVectors>& exponents,
                                         int64_t vector) {
    Vec p[kRows * kVectors];
    exp2_joined<Math::kExpDegree>(exponents, p);
#pragma GCC unroll 8
    for (int i = 0; i < kRows * kVectors; ++i) {
      sum[i / kVectors] += p[i];
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      store_probabilities<Math, kVectors>(scores + r * score_row, vector * kLanes,
                                          p + r * kVectors);
    }
  }

  PATCHGEN_FAST_INLINE_MEMBER void put_sums(float* to) const {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      to[r] = sum_lanes(sum[r]);
    }
  }
};

// Updates maxima, and sets sums to those of these keys alone; any number of rows, one by one.
template <class Math>
void softmax_row(const Scores& scores, float factor, float* maxima, float* sums) {
  const int64_t vectors = scores.vectors;
  raise_maxima<1>(scores, maxima);
  RowsToWeigh<Math, 1> row(scores.data, 0, maxima, factor);
  int64_t v = 0;
  for (; v + Math::kGroup <= vectors; v += Math::kGroup) {
    row.template weigh<Math::kGroup>(row.template exponents<Math::kGroup>(v), v);
  }
  for (; v < vectors; ++v) {
    row.template weigh<1>(row.template exponents<1>(v), v);
  }
  row.put_sums(sums);
}

// The same of a multiple of four rows. The steps of one vector wait for each other longer than the
// processor looks ahead; so the next vectors are begun before these are ended, across rows too.
template <class Math>
void softmax_rows(const Scores& scores, int64_t rows, float factor, float* maxima, float* sums) {
  constexpr int kMaxima = 4, kRows = 2, kVectors = kRegisters == 32 ? 2 : 1;
  const int64_t vectors = scores.vectors;
  raise_maxima<kMaxima>(scores, maxima);
  RowsToWeigh<Math, kRows> here(scores.data, scores.row, maxima, factor);
  auto now = here.template exponents<kVectors>(0);
  for (int64_t r = 0; r < rows; r += kRows) {
    if (r % kMaxima == 0 && r + kMaxima < rows) {
      const int64_t next = r + kMaxima;
      raise_maxima<kMaxima>(scores.at(next), maxima + next);
    }
    int64_t v = 0;
    for (; v + 2 * kVectors <= vectors; v += kVectors) {
      const auto next = here.template exponents<kVectors>(v + kVectors);
      here.template weigh<kVectors>(now, v);
      now = next;
    }
    const int64_t after = smaller(r + kRows, rows - kRows);
    const RowsToWeigh<Math, kRows> then(scores.at(after).data, scores.row, maxima + after, factor);
    const auto next = then.template exponents<kVectors>(0);
    here.template weigh<kVectors>(now, v);
    for (v += kVectors; v < vectors; ++v) {
      here.template weigh<1>(here.template exponents<1>(v), v);
    }
    here.put_sums(sums + r);
    here = then;
    now = next;
  }
}

template <class Math>
void softmax_block(const Scores& scores, int64_t rows, float factor, float* maxima, float* sums) {
  int64_t r = scores.vectors < 2 ? 0 : rows / 4 * 4;
  if (r > 0) {
    softmax_rows<Math>(scores, r, factor, maxima, sums);
  }
  for (; r < rows; ++r) {
    softmax_row<Math>(scores.at(r), factor, maxima + r, sums + r);
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
