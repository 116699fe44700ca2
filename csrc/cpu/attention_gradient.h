// Weights and score gradients of one block of query rows against one panel of keys, recomputed from
// the forward's log-sum-exp:
//
//     P = exp(scale * Q K^T + mask - lse)      dP = dO V^T      dS = P * (dP - delta + d(lse))
//
// A block is computed in strips of few rows, whose scores and dP stay in the first-level cache
// while they become P and dS. Two of the three products that follow contract over query rows and
// want P and dS with rows as steps: floats take the place of the scores ([row][key], read across),
// bf16 is written in pairs of rows, [row / 2][key]. The third, dS K, contracts over keys, for which
// bf16 keeps dS a second time, row by row.
//
// delta is a row's sum of P * dP. Where a panel holds all keys it is summed here, and P is divided
// by its own sum, which takes off the rounding of lse. Over several panels delta is sum_d dO * O
// instead (Dao 2023, FlashAttention-2, section 3.1) and lse is taken at its word, so that one pass
// makes P and dS; unless `statistics` holds both sums, measured beforehand: for an additive mask,
// under which lse may be so large that it has no digits left for the number of keys (a row of
// finfo.min), and for few rows, where it is cheap.
#pragma once

#include "attention_gradient_shape.h"

namespace patchgen_fast {
namespace {

template <class Math, class Element>
class ScoreGradient {
 public:
  // `in_pairs`: as pairs of rows where Math has them.
  ScoreGradient(const AttentionBackward& problem, const GradientShape<Math>& shape, Carver& carver,
                bool in_pairs)
      : problem_(problem), shape_(shape), in_pairs_(Math::kGroup == 2 && in_pairs) {
    keys_ = carver.floats(shape.panel * shape.steps);
    values_ = carver.floats(shape.panel * shape.steps);
    rows_ = carver.floats(kStripRows * shape.query_row);
    weights = carver.floats(shape.rows * shape.score_row / (in_pairs_ ? 2 : 1));
    scores = carver.floats(shape.rows * shape.score_row / (in_pairs_ ? 2 : 1));
    if (shape.panels > 1) {
      deltas_of_rows_ = carver.floats(problem.heads / problem.kv_heads * problem.queries);
    }
    if (in_pairs_) {
      strip_weights_ = carver.floats(kStripRows * shape.score_row);
      strip_scores_ = carver.floats(kStripRows * shape.score_row);
      score_rows_ = carver.floats(shape.rows * score_row_stride());
    }
  }

  void pack(const HeadView& view, const KeyPanel& panel) {
    const AttentionTensor& key = problem_.key;
    const AttentionTensor& value = problem_.value;
    pack_keys<Math>(view.element<Element>(key, view.kv_head, panel.first), key.token, panel.keys,
                    problem_.dim, keys_);
    pack_keys<Math>(view.element<Element>(value, view.kv_head, panel.first), value.token,
                    panel.keys, problem_.dim, values_);
  }

  // Sums dO * O of all rows of a head, for where several panels share the sum.
  void sum_outputs(const HeadView& view, int64_t head) {
    constexpr int64_t kRowsAhead = 12;
    float* deltas = deltas_of(view, head);
    for (int64_t query = 0; query < problem_.queries; ++query) {
      const int64_t soon = smaller(query + kRowsAhead, problem_.queries - 1);
      bring_row(view.element<Element>(problem_.out, head, soon), problem_.dim * sizeof(Element));
      bring_row(view.element<Element>(problem_.grad_out, head, soon),
                problem_.dim * sizeof(Element));
      const Element* out = view.element<Element>(problem_.out, head, query);
      const Element* grad = view.element<Element>(problem_.grad_out, head, query);
      Vec sum{};
      for (int64_t d = 0; d < problem_.dim; d += kLanes) {
        const int64_t count = problem_.dim - d;
        sum = fma(load_up_to(out + d, count), load_up_to(grad + d, count), sum);
      }
      deltas[query] = sum_lanes(sum);
    }
  }

  // Adds a panel's sums of P and of P * dP to the rows' statistics.
  void measure(const HeadView& view, const QueryRows& rows, const KeyPanel& panel) {
    float* sums = statistics(view, rows);
    float* deltas = sums + statistics_stride();
    for (int64_t first = 0; first < rows.rows; first += kStripRows) {
      const Strip strip = strip_at(view, rows, first);
      score(view, strip, panel);
      weigh(strip, divide_up(view.visible(strip, panel), kLanes));
      for (int64_t r = 0; r < strip.rows; ++r) {
        sums[first + r] += sums_[r];
        deltas[first + r] += deltas_[r];
      }
    }
  }

  // Fills weights and scores with P and dS.
  void compute(const HeadView& view, const QueryRows& rows, const KeyPanel& panel) {
    const int64_t all_vectors = divide_up(view.visible(rows, panel), kLanes);
    const bool sums_known = shape_.panels > 1 && problem_.statistics == nullptr;
    for (int64_t first = 0; first < rows.rows; first += kStripRows) {
      const Strip strip = strip_at(view, rows, first);
      const int64_t vectors = divide_up(view.visible(strip, panel), kLanes);
      score(view, strip, panel);
      if (sums_known) {
        settle(view, strip);
        differentiate<true>(strip, vectors, all_vectors);
      } else {
        weigh(strip, vectors);
        settle(view, strip);
        differentiate<false>(strip, vectors, all_vectors);
      }
    }
  }

  // dS with keys as steps.
  Units by_row() const {
    return in_pairs_ ? Units{score_rows_, score_row_stride()} : Units{scores, shape_.score_row};
  }

  // P or dS with query rows as steps, one output row a key.
  Units across(const float* matrix) const { return {matrix, 1, shape_.score_row}; }

  float *weights, *scores;
  Prefetch ahead;  // brought in during the products

 private:
  // Some rows of a block while their scores lie in the first-level cache as floats.
  struct Strip : QueryRows {
    int64_t first;  // its first row, counted from the block's
    float *weights, *scores;
    const float* lse;
    float to_natural;
  };

  Strip strip_at(const HeadView& view, const QueryRows& rows, int64_t first) const {
    Strip strip;
    strip.head = rows.head;
    strip.query = rows.query + first;
    strip.rows = smaller(kStripRows, rows.rows - first);
    strip.first = first;
    strip.weights = in_pairs_ ? strip_weights_ : weights + first * shape_.score_row;
    strip.scores = in_pairs_ ? strip_scores_ : scores + first * shape_.score_row;
    strip.lse = problem_.lse + lse_row(view, strip);
    strip.to_natural = view.to_natural;
    return strip;
  }

  int64_t score_row_stride() const { return round_up(shape_.panel / 2, kLanes) + kLanes; }

  float* deltas_of(const HeadView& view, int64_t head) const {
    const int64_t group = problem_.heads / problem_.kv_heads;
    return deltas_of_rows_ + (head - view.kv_head * group) * problem_.queries;
  }

  int64_t statistics_stride() const { return problem_.batch * problem_.heads * problem_.queries; }

  float* statistics(const HeadView& view, const QueryRows& rows) const {
    return problem_.statistics + (view.batch * problem_.heads + rows.head) * problem_.queries +
           rows.query;
  }

  int64_t lse_row(const HeadView& view, const QueryRows& rows) const {
    return problem_.lse_row(view.batch, rows.head, rows.query);
  }

  // weights = masked scores, scores = dP
  void score(const HeadView& view, const Strip& strip, const KeyPanel& panel) {
    product(view, problem_.query, strip, panel, view.sign, keys_, strip.weights);
    view.mask(strip, panel, strip.weights, shape_.score_row);
    product(view, problem_.grad_out, strip, panel, 1.0f, values_, strip.scores);
  }

  void product(const HeadView& view, const AttentionTensor& tensor, const QueryRows& rows,
               const KeyPanel& panel, float sign, const float* panel_keys, float* to) {
    const Units units =
        rows_as_units<Math>(view.element<Element>(tensor, rows.head, rows.query), tensor.token,
                            rows.rows, problem_.dim, sign, rows_, shape_.query_row);
    multiply_keys<Math>(units, rows.rows, panel_keys, panel.keys, view.visible(rows, panel),
                        shape_.steps, to, shape_.score_row);
  }

  // weights = exp(weights - lse), and both sums of each row.
  void weigh(const Strip& strip, int64_t vectors) {
    constexpr int kRowsAtOnce = 4;
    int64_t r = 0;
    for (; r + kRowsAtOnce <= strip.rows; r += kRowsAtOnce) {
      weigh_rows<kRowsAtOnce>(strip, r, vectors);
    }
    for (; r < strip.rows; ++r) {
      weigh_rows<1>(strip, r, vectors);
    }
  }

  // For -inf, of an empty row, stands +inf: every weight is 0.
  static float shift_of(float lse) { return lse == kMinusInfinity ? kMinusInfinity : -lse; }

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
  void weigh_rows(const Strip& strip, int64_t row, int64_t vectors) {
    float* weight = strip.weights + row * shape_.score_row;
    const float* gradient = strip.scores + row * shape_.score_row;
    const Vec to_natural = broadcast(strip.to_natural);
    Vec shift[kRows], sum[kRows] = {}, delta[kRows] = {};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      shift[r] = broadcast(shift_of(strip.lse[row + r]));
    }
    for (int64_t v = 0; v < vectors; ++v, weight += kLanes, gradient += kLanes) {
      Vec p[kRows], lost{};
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        p[r] = fma(load(weight + r * shape_.score_row), to_natural, shift[r]);
      }
      if constexpr (kRows == 1) {
        lost = lost_to_rounding(load(weight), to_natural, shift[0], p[0]);
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
        delta = measured ? kept[statistics_stride()] : deltas_of(view, rows.head)[rows.query + r];
      }
      const bool empty = problem_.lse[first + r] == kMinusInfinity;
      const float grad_lse = problem_.grad_lse == nullptr ? 0.0f : problem_.grad_lse[first + r];
      sums_[r] = empty ? 0.0f : 1.0f / sum;
      deltas_[r] = empty ? 0.0f : delta / sum - grad_lse;
    }
  }

  // A row of a strip on its way to P and dS: from scores if kFromScores, else from weights.
  template <bool kFromScores>
  struct Row {
    float *weight, *score;
    Vec to_natural, shift, inverse, delta;
  };

  // P and dS of kVectors from `at` on, row by row. Exponentials of all rows together, for one row's
  // steps wait for each other.
  template <bool kFromScores, int kRows, int kVectors>
  static PATCHGEN_FAST_INLINE_MEMBER void differentiate_at(const Row<kFromScores> (&rows)[kRows],
                                                           int64_t at, Vec (&p)[kRows * kVectors],
                                                           Vec (&ds)[kRows * kVectors]) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows * kVectors; ++i) {
      const Row<kFromScores>& row = rows[i / kVectors];
      const Vec x = load(row.weight + at + i % kVectors * kLanes);
      p[i] = kFromScores ? fma(x, row.to_natural, row.shift) : x * row.inverse;
    }
    if constexpr (kFromScores) {
      exp2_scaled<Math::kExpDegree>(p, broadcast(kLog2e));
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows * kVectors; ++i) {
      const Row<kFromScores>& row = rows[i / kVectors];
      ds[i] = p[i] * (load(row.score + at + i % kVectors * kLanes) - row.delta);
    }
  }

  template <bool kFromScores>
  Row<kFromScores> row_of(const Strip& strip, int64_t row) const {
    return {strip.weights + row * shape_.score_row,
            strip.scores + row * shape_.score_row,
            broadcast(strip.to_natural),
            broadcast(shift_of(strip.lse[row])),
            broadcast(sums_[row]),
            broadcast(deltas_[row])};
  }

  // The same of an even number of vectors, the last of which may give 0; of the last row if there
  // are fewer, then all of it 0.
  template <bool kFromScores>
  Row<kFromScores> paired_row_of(const Strip& strip, int64_t row, int64_t vectors) {
    Row<kFromScores> found = row_of<kFromScores>(strip, smaller(row, strip.rows - 1));
    if (row >= strip.rows) {
      found.shift = broadcast(kMinusInfinity);
      found.inverse = Vec{};
    }
    if (vectors % 2 != 0) {
      store(found.weight + vectors * kLanes, broadcast(kFromScores ? kMinusInfinity : 0.0f));
      store(found.score + vectors * kLanes, Vec{});
    }
    return found;
  }

  // P and dS from the strip's `vectors` that some row sees; 0 in those that only other strips see.
  template <bool kFromScores>
  void differentiate(const Strip& strip, int64_t vectors, int64_t all_vectors) {
    if constexpr (Math::kGroup == 2) {
      if (in_pairs_) {
        for (int64_t r = 0; r < strip.rows; r += 2) {
          differentiate_pair<kFromScores>(strip, r, vectors, all_vectors);
        }
        return;
      }
    }
    for (int64_t r = 0; r < strip.rows; ++r) {
      differentiate_row<kFromScores>({row_of<kFromScores>(strip, r)}, vectors, all_vectors);
    }
  }

  template <bool kFromScores>
  void differentiate_row(const Row<kFromScores> (&row)[1], int64_t vectors, int64_t all_vectors) {
    constexpr int64_t kTwo = 2 * kLanes;
    Vec p[2], ds[2];
    int64_t at = 0;
    for (; at + kTwo <= vectors * kLanes; at += kTwo) {
      differentiate_at<kFromScores, 1, 2>(row, at, p, ds);
      store_pairs(row[0].weight + at, {p[0], p[1]});
      store_pairs(row[0].score + at, {ds[0], ds[1]});
    }
    if (at < vectors * kLanes) {
      Vec last_p[1], last_ds[1];
      differentiate_at<kFromScores, 1, 1>(row, at, last_p, last_ds);
      store(row[0].weight + at, last_p[0]);
      store(row[0].score + at, last_ds[0]);
    }
    clear(row[0].weight, vectors, all_vectors);
    clear(row[0].score, vectors, all_vectors);
  }

  PATCHGEN_FAST_INLINE void clear(float* row, int64_t first_vector, int64_t last_vector) {
    for (int64_t v = first_vector; v < last_vector; ++v) {
      store(row + v * kLanes, Vec{});
    }
  }

  // Rows r and r + 1 (0 if there is none) into one row of pairs, and dS into score_rows_, two
  // vectors at a time.
  template <bool kFromScores>
  void differentiate_pair(const Strip& strip, int64_t row, int64_t vectors, int64_t all_vectors) {
    const int64_t block_row = strip.first + row;
    const Row<kFromScores> rows[] = {paired_row_of<kFromScores>(strip, row, vectors),
                                     paired_row_of<kFromScores>(strip, row + 1, vectors)};
    float* by_row = score_rows_ + block_row * score_row_stride();
    float* pair_weights = weights + block_row / 2 * shape_.score_row;
    float* pair_scores = scores + block_row / 2 * shape_.score_row;
    for (int64_t at = 0; at < vectors * kLanes; at += 2 * kLanes) {
      Vec p[4], ds[4];
      differentiate_at<kFromScores, 2, 2>(rows, at, p, ds);
      const Vec p_of[] = {to_bf16(p[0], p[1]), to_bf16(p[2], p[3])};
      const Vec ds_of[] = {to_bf16(ds[0], ds[1]), to_bf16(ds[2], ds[3])};
      store_pairs(pair_weights + at, interleave(p_of[0], p_of[1]));
      store_pairs(pair_scores + at, interleave(ds_of[0], ds_of[1]));
      store(by_row + at / 2, ds_of[0]);
      store(by_row + score_row_stride() + at / 2, ds_of[1]);
    }
    clear(pair_weights, vectors, all_vectors);
    clear(pair_scores, vectors, all_vectors);
    for (int r = 0; r < 2; ++r) {
      clear(by_row + r * score_row_stride(), divide_up(vectors, 2), divide_up(all_vectors, 2));
    }
  }

  const AttentionBackward& problem_;
  const GradientShape<Math>& shape_;
  const bool in_pairs_;
  float *keys_, *values_, *rows_, *deltas_of_rows_ = nullptr;
  float *strip_weights_ = nullptr, *strip_scores_ = nullptr, *score_rows_ = nullptr;
  float sums_[kStripRows], deltas_[kStripRows];
};

}  // namespace
}  // namespace patchgen_fast
