// Weights and score gradients of one block of query rows against one panel of keys, recomputed from
// the forward's log-sum-exp:
//
//     P = exp(scale * Q K^T + mask - lse)      dP = dO V^T      dS = P * (dP - delta + d(lse))
//
// P takes the place of the scores, dS that of dP, in cache. Two of the three products that follow
// contract over query rows and want P and dS with rows as steps: floats serve as they lie
// ([row][key], read across), bf16 is written in pairs of rows, [row / 2][key]. The third, dS K,
// contracts over keys, for which bf16 keeps dS a second time, row by row.
//
// delta is a row's sum of P * dP. Where a panel holds all keys it is summed here, and P is divided
// by its own sum, which takes off the rounding of lse. Over several panels delta is sum_d dO * O
// instead (Dao 2023, FlashAttention-2, section 3.1) and lse is taken at its word, unless
// `statistics` holds both sums, measured beforehand: for an additive mask, under which lse may be
// so large that it has no digits left for the number of keys (a row of finfo.min), and for few
// rows, where it is cheap.
#pragma once

#include "attention_view.h"

namespace patchgen_fast {
namespace {

constexpr int64_t kGradientRows = 96;   // most query rows of a block; a multiple of all row tiles
constexpr int64_t kGradientKeys = 256;  // most keys of a panel
constexpr int64_t kGradientFloats = 16384;  // most floats of a panel's operand: 64 KiB

template <class Math>
struct GradientShape {
  explicit GradientShape(const AttentionInputs& inputs)
      : steps(divide_up(inputs.dim, Math::kGroup)),
        query_row(round_up(steps, kLanes)),
        columns(round_up(inputs.dim, kLanes)),
        panels(larger(1, divide_up(inputs.keys, panel_limit(columns)))),
        panel(round_up(larger(1, divide_up(inputs.keys, panels)), kLanes)),
        score_row(panel + kLanes),
        blocks_per_head(divide_up(inputs.queries, kGradientRows)),
        rows(round_up(divide_up(inputs.queries, larger(1, blocks_per_head)), Math::kGroup)) {}

  static int64_t panel_limit(int64_t columns) {
    return smaller(kGradientKeys, larger(64, kGradientFloats / columns));
  }

  // Whether the rows' sums are to be measured before the gradients are computed.
  bool measured(const AttentionInputs& inputs) const {
    const bool additive = inputs.mask.data != nullptr && inputs.mask.dtype != Dtype::boolean;
    return panels > 1 && (additive || blocks_per_head == 1);
  }

  QueryRows block(int64_t head, int64_t index, int64_t queries) const {
    return {head, index * rows, smaller(rows, queries - index * rows)};
  }

  int64_t steps;      // of the products over dim, in units
  int64_t query_row;  // units of a packed row whose dims are steps
  int64_t columns;    // units of a packed row whose dims are lanes
  int64_t panels;
  int64_t panel;  // keys of a panel
  int64_t score_row;
  int64_t blocks_per_head;
  int64_t rows;  // of a block
};

// Hands out a task's scratch piece by piece; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<unsigned char*>(base)) {}

  float* floats(int64_t count) {
    unsigned char* here = base_ + bytes_;
    bytes_ += static_cast<size_t>(round_up(count * 4, 64));
    return reinterpret_cast<float*>(here);
  }

  size_t bytes() const { return bytes_; }

 private:
  unsigned char* base_;
  size_t bytes_ = 0;
};

// Pairs of two rows' bf16: the first row's in the low halves.
PATCHGEN_FAST_INLINE Vec interleave_as_bf16(Vec first, Vec second) {
#if defined(__AVX512BF16__)
  const __m512i halves = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  const VecInt lane = iota();
  return bit_cast<Vec>(_mm512_permutexvar_epi16((__m512i)(lane | ((lane + 16) << 16)), halves));
#else
  (void)second;
  return first;
#endif
}

template <class Math, class Element>
class ScoreGradient {
 public:
  ScoreGradient(const AttentionBackward& problem, const GradientShape<Math>& shape, Carver& carver)
      : problem_(problem), shape_(shape) {
    keys_ = carver.floats(shape.panel * shape.steps);
    values_ = carver.floats(shape.panel * shape.steps);
    rows_ = carver.floats(shape.rows * shape.query_row);
    weights = carver.floats(shape.rows * shape.score_row);
    scores = carver.floats(shape.rows * shape.score_row);
    // An even number of rows, so that the last pair may have but one.
    score_rows_ =
        carver.floats(Math::kGroup == 1 ? 0 : round_up(shape.rows, 2) * score_row_stride());
    sums_ = carver.floats(shape.rows);
    deltas_ = carver.floats(shape.rows);
  }

  void pack(const HeadView& view, const KeyPanel& panel) {
    const AttentionTensor& key = problem_.key;
    const AttentionTensor& value = problem_.value;
    pack_keys<Math>(view.element<Element>(key, view.kv_head, panel.first), key.token, panel.keys,
                    problem_.dim, keys_);
    pack_keys<Math>(view.element<Element>(value, view.kv_head, panel.first), value.token,
                    panel.keys, problem_.dim, values_);
  }

  // Adds a panel's sums of P and of P * dP to the rows' statistics.
  void measure(const HeadView& view, const QueryRows& rows, const KeyPanel& panel) {
    weigh(view, rows, panel);
    float* sums = statistics(view, rows);
    float* deltas = sums + statistics_stride();
    for (int64_t r = 0; r < rows.rows; ++r) {
      sums[r] += sums_[r];
      deltas[r] += deltas_[r];
    }
  }

  // Fills weights and scores with P and dS; as pairs of rows where Math has them and `in_pairs`.
  void compute(const HeadView& view, const QueryRows& rows, const KeyPanel& panel, bool in_pairs) {
    weigh(view, rows, panel);
    settle(view, rows);
    const int64_t vectors = divide_up(view.visible(rows, panel), kLanes);
    if (Math::kGroup == 2 && in_pairs) {
      for (int64_t r = 0; r < rows.rows; r += 2) {
        differentiate_pair(r, r + 1 < rows.rows, vectors);
      }
    } else {
      for (int64_t r = 0; r < rows.rows; ++r) {
        differentiate_row(r, vectors);
      }
    }
  }

  // dS with keys as steps.
  Units by_row() const {
    return Math::kGroup == 1 ? Units{scores, shape_.score_row}
                             : Units{score_rows_, score_row_stride()};
  }

  // P or dS with query rows as steps, one output row a key.
  Units across(const float* matrix) const { return {matrix, 1, shape_.score_row}; }

  float *weights, *scores;
  Prefetch ahead;  // brought in during the products

 private:
  int64_t score_row_stride() const { return shape_.panel / 2 + kLanes; }

  int64_t statistics_stride() const { return problem_.batch * problem_.heads * problem_.queries; }

  float* statistics(const HeadView& view, const QueryRows& rows) const {
    return problem_.statistics + (view.batch * problem_.heads + rows.head) * problem_.queries +
           rows.query;
  }

  int64_t lse_row(const HeadView& view, const QueryRows& rows) const {
    return problem_.lse_row(view.batch, rows.head, rows.query);
  }

  // weights = exp(scores - lse), scores = dP, and both sums of each row.
  void weigh(const HeadView& view, const QueryRows& rows, const KeyPanel& panel) {
    const int64_t vectors = divide_up(view.visible(rows, panel), kLanes);
    product(view, problem_.query, rows, panel, view.sign, keys_, weights);
    view.mask(rows, panel, weights, shape_.score_row);
    product(view, problem_.grad_out, rows, panel, 1.0f, values_, scores);
    const float* lse = problem_.lse + lse_row(view, rows);
    int64_t r = 0;
    for (; r + kRowsAtOnce <= rows.rows; r += kRowsAtOnce) {
      weigh_rows<kRowsAtOnce>(r, lse + r, view.to_natural, vectors);
    }
    for (; r < rows.rows; ++r) {
      weigh_rows<1>(r, lse + r, view.to_natural, vectors);
    }
  }

  void product(const HeadView& view, const AttentionTensor& tensor, const QueryRows& rows,
               const KeyPanel& panel, float sign, const float* panel_keys, float* to) {
    const Units units =
        rows_as_units<Math>(view.element<Element>(tensor, rows.head, rows.query), tensor.token,
                            rows.rows, problem_.dim, sign, rows_, shape_.query_row);
    multiply_keys<Math>(units, rows.rows, panel_keys, panel.keys, view.visible(rows, panel),
                        shape_.steps, to, shape_.score_row);
  }

  static constexpr int kRowsAtOnce = 4;

  // What rounding took from score * factor + shift. Two-sum (Knuth 1969); 0 where it is infinite.
  static PATCHGEN_FAST_INLINE_MEMBER Vec lost_to_rounding(Vec score, Vec factor, Vec shift,
                                                          Vec rounded) {
    const Vec scaled = score * factor;
    const Vec sum = scaled + shift, part = sum - scaled;
    const Vec of_sum = (scaled - (sum - part)) + (shift - part);
    const Vec lost = (sum - rounded) + of_sum + fma(score, factor, -scaled);
    return select(rounded == kMinusInfinity, Vec{}, lost);
  }

  // The logarithm of a large weight among many keys is the difference of two numbers near lse: the
  // rounding of their size shows where few rows make a gradient, and costs nothing to mend there.
  template <int kRows>
  void weigh_rows(int64_t row, const float* lse, float to_natural, int64_t vectors) {
    float* weight = weights + row * shape_.score_row;
    const float* gradient = scores + row * shape_.score_row;
    Vec shift[kRows], sum[kRows] = {}, delta[kRows] = {};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      // For -inf, of an empty row, stands +inf: every weight is 0.
      shift[r] = broadcast(lse[r] == kMinusInfinity ? kMinusInfinity : -lse[r]);
    }
    for (int64_t v = 0; v < vectors; ++v, weight += kLanes, gradient += kLanes) {
      Vec p[kRows], lost{};
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        p[r] = fma(load(weight + r * shape_.score_row), broadcast(to_natural), shift[r]);
      }
      if constexpr (kRows == 1) {
        lost = lost_to_rounding(load(weight), broadcast(to_natural), shift[0], p[0]);
      }
      exp2_scaled<Math::kExpDegree>(p, broadcast(kLog2e));
      if constexpr (kRows == 1) {
        p[0] = fma(p[0], lost, p[0]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        store(weight + r * shape_.score_row, p[r]);
        sum[r] += p[r];
        delta[r] = fma(p[r], load(gradient + r * shape_.score_row), delta[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sums_[row + r] = sum_lanes(sum[r]);
      deltas_[row + r] = sum_lanes(delta[r]);
    }
  }

  // The rows' final statistics: sums_ becomes what P is multiplied by, deltas_ delta - d(lse).
  void settle(const HeadView& view, const QueryRows& rows) {
    const int64_t first = lse_row(view, rows);
    for (int64_t r = 0; r < rows.rows; ++r) {
      float sum = sums_[r], delta = deltas_[r];
      if (shape_.panels > 1) {
        const bool measured = problem_.statistics != nullptr;
        const float* kept = measured ? statistics(view, rows) + r : nullptr;
        sum = measured ? kept[0] : 1.0f;
        delta = measured ? kept[statistics_stride()] : delta_of(view, rows, r);
      }
      const bool empty = problem_.lse[first + r] == kMinusInfinity;
      const float grad_lse = problem_.grad_lse == nullptr ? 0.0f : problem_.grad_lse[first + r];
      sums_[r] = empty ? 0.0f : 1.0f / sum;
      deltas_[r] = empty ? 0.0f : delta / sum - grad_lse;
    }
  }

  float delta_of(const HeadView& view, const QueryRows& rows, int64_t r) const {
    const Element* out = view.element<Element>(problem_.out, rows.head, rows.query + r);
    const Element* grad = view.element<Element>(problem_.grad_out, rows.head, rows.query + r);
    Vec sum{};
    for (int64_t d = 0; d < problem_.dim; d += kLanes) {
      const int64_t count = problem_.dim - d;
      sum = fma(load_up_to(out + d, count), load_up_to(grad + d, count), sum);
    }
    return sum_lanes(sum);
  }

  struct Gradient {
    Vec weight, score;
  };

  PATCHGEN_FAST_INLINE Gradient differentiate(const float* weight, const float* gradient,
                                              float inverse, float delta) {
    const Vec p = load(weight) * broadcast(inverse);
    return {p, p * (load(gradient) - broadcast(delta))};
  }

  void differentiate_row(int64_t row, int64_t vectors) {
    const float inverse = sums_[row], delta = deltas_[row];
    float* weight = weights + row * shape_.score_row;
    float* score = scores + row * shape_.score_row;
    for (int64_t at = 0; at < vectors * kLanes; at += kLanes) {
      const Gradient g = differentiate(weight + at, score + at, inverse, delta);
      store(weight + at, g.weight);
      store(score + at, g.score);
    }
  }

  // Rows r and r + 1 (0 if there is none) into row r / 2 of pairs, and dS into score_rows_. What is
  // written lies at or before what has been read.
  void differentiate_pair(int64_t row, bool two, int64_t vectors) {
    const float inverse[] = {sums_[row], two ? sums_[row + 1] : 0.0f};
    const float delta[] = {deltas_[row], two ? deltas_[row + 1] : 0.0f};
    const float* weight = weights + row * shape_.score_row;
    const float* score = scores + row * shape_.score_row;
    const int64_t next = two ? shape_.score_row : 0;
    float* pair_weights = weights + row / 2 * shape_.score_row;
    float* pair_scores = scores + row / 2 * shape_.score_row;
    auto* upper = reinterpret_cast<unsigned char*>(score_rows_ + row * score_row_stride());
    auto* lower = upper + score_row_stride() * 4;
    for (int64_t at = 0; at < vectors * kLanes; at += kLanes) {
      const Gradient a = differentiate(weight + at, score + at, inverse[0], delta[0]);
      const Gradient b = differentiate(weight + next + at, score + next + at, inverse[1], delta[1]);
      store(pair_weights + at, interleave_as_bf16(a.weight, b.weight));
      store(pair_scores + at, interleave_as_bf16(a.score, b.score));
      store_bits(upper + at * 2, to_bf16(a.score));
      store_bits(lower + at * 2, to_bf16(b.score));
    }
  }

  const AttentionBackward& problem_;
  const GradientShape<Math>& shape_;
  float *keys_, *values_, *rows_, *score_rows_, *sums_, *deltas_;
};

}  // namespace
}  // namespace patchgen_fast
