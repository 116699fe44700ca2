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
// instead (Dao 2023, FlashAttention-2, section 3.1) and lse is taken at its word, unless
// `statistics` holds both sums, measured beforehand: for an additive mask, under which lse may be
// so large that it has no digits left for the number of keys (a row of finfo.min), and for few
// rows, where it is cheap.
#pragma once

#include "attention_view.h"

namespace patchgen_fast {
namespace {

constexpr int64_t kGradientRows = 96;  // most query rows of a block
constexpr int64_t kRowsTogether = 8;   // of the tiles of Q K^T and dO V^T: blocks are multiples
constexpr int64_t kStripRows = 16;     // of a strip: its scores and dP fit in the first-level cache
constexpr int64_t kGradientKeys = 256;      // most keys of a panel
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
        rows(round_up(divide_up(inputs.queries, larger(1, blocks_per_head)), kRowsTogether)) {}

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
      const Strip strip = strip_at(rows, first);
      weigh(view, strip, panel);
      for (int64_t r = 0; r < strip.rows; ++r) {
        sums[first + r] += sums_[r];
        deltas[first + r] += deltas_[r];
      }
    }
  }

  // Fills weights and scores with P and dS.
  void compute(const HeadView& view, const QueryRows& rows, const KeyPanel& panel) {
    const int64_t vectors = divide_up(view.visible(rows, panel), kLanes);
    for (int64_t first = 0; first < rows.rows; first += kStripRows) {
      const Strip strip = strip_at(rows, first);
      weigh(view, strip, panel);
      settle(view, strip);
      differentiate(strip, divide_up(view.visible(strip, panel), kLanes), vectors);
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
  };

  Strip strip_at(const QueryRows& rows, int64_t first) const {
    Strip strip;
    strip.head = rows.head;
    strip.query = rows.query + first;
    strip.rows = smaller(kStripRows, rows.rows - first);
    strip.first = first;
    strip.weights = in_pairs_ ? strip_weights_ : weights + first * shape_.score_row;
    strip.scores = in_pairs_ ? strip_scores_ : scores + first * shape_.score_row;
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

  // weights = exp(scores - lse), scores = dP, and both sums of each row.
  void weigh(const HeadView& view, const Strip& strip, const KeyPanel& panel) {
    const int64_t vectors = divide_up(view.visible(strip, panel), kLanes);
    product(view, problem_.query, strip, panel, view.sign, keys_, strip.weights);
    view.mask(strip, panel, strip.weights, shape_.score_row);
    product(view, problem_.grad_out, strip, panel, 1.0f, values_, strip.scores);
    const float* lse = problem_.lse + lse_row(view, strip);
    int64_t r = 0;
    for (; r + kRowsAtOnce <= strip.rows; r += kRowsAtOnce) {
      weigh_rows<kRowsAtOnce>(strip, r, lse + r, view.to_natural, vectors);
    }
    for (; r < strip.rows; ++r) {
      weigh_rows<1>(strip, r, lse + r, view.to_natural, vectors);
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
  void weigh_rows(const Strip& strip, int64_t row, const float* lse, float to_natural,
                  int64_t vectors) {
    float* weight = strip.weights + row * shape_.score_row;
    const float* gradient = strip.scores + row * shape_.score_row;
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
        delta = measured ? kept[statistics_stride()] : deltas_of(view, rows.head)[rows.query + r];
      }
      const bool empty = problem_.lse[first + r] == kMinusInfinity;
      const float grad_lse = problem_.grad_lse == nullptr ? 0.0f : problem_.grad_lse[first + r];
      sums_[r] = empty ? 0.0f : 1.0f / sum;
      deltas_[r] = empty ? 0.0f : delta / sum - grad_lse;
    }
  }

  struct Gradient {
    Vec weight, score;
  };

  PATCHGEN_FAST_INLINE Gradient differentiate(const float* weight, const float* gradient,
                                              float inverse, float delta) {
    const Vec p = load(weight) * broadcast(inverse);
    return {p, p * (load(gradient) - broadcast(delta))};
  }

  // P and dS from the strip's `vectors` that some row sees; 0 in those that only other strips see.
  void differentiate(const Strip& strip, int64_t vectors, int64_t all_vectors) {
    if constexpr (Math::kGroup == 2) {
      if (in_pairs_) {
        for (int64_t r = 0; r < strip.rows; r += 2) {
          differentiate_pair(strip, r, vectors, all_vectors);
        }
        return;
      }
    }
    for (int64_t r = 0; r < strip.rows; ++r) {
      differentiate_row(strip, r, vectors, all_vectors);
    }
  }

  void differentiate_row(const Strip& strip, int64_t row, int64_t vectors, int64_t all_vectors) {
    const float inverse = sums_[row], delta = deltas_[row];
    float* weight = strip.weights + row * shape_.score_row;
    float* score = strip.scores + row * shape_.score_row;
    for (int64_t at = 0; at < vectors * kLanes; at += kLanes) {
      const Gradient g = differentiate(weight + at, score + at, inverse, delta);
      store(weight + at, g.weight);
      store(score + at, g.score);
    }
    clear(weight, vectors, all_vectors);
    clear(score, vectors, all_vectors);
  }

  PATCHGEN_FAST_INLINE void clear(float* row, int64_t first_vector, int64_t last_vector) {
    for (int64_t v = first_vector; v < last_vector; ++v) {
      store(row + v * kLanes, Vec{});
    }
  }

  // Rows r and r + 1 (0 if there is none) into one row of pairs, and dS into score_rows_, two
  // vectors at a time.
  void differentiate_pair(const Strip& strip, int64_t row, int64_t vectors, int64_t all_vectors) {
    const bool two = row + 1 < strip.rows;
    const float inverse[] = {sums_[row], two ? sums_[row + 1] : 0.0f};
    const float delta[] = {deltas_[row], two ? deltas_[row + 1] : 0.0f};
    float *weight[2], *score[2], *by_row[2];
    const int64_t block_row = strip.first + row;
    for (int r = 0; r < 2; ++r) {
      const int64_t from = row + (two ? r : 0);
      weight[r] = strip.weights + from * shape_.score_row;
      score[r] = strip.scores + from * shape_.score_row;
      by_row[r] = score_rows_ + (block_row + r) * score_row_stride();
      clear(weight[r], vectors, round_up(vectors, 2));
      clear(score[r], vectors, round_up(vectors, 2));
    }
    float* pair_weights = weights + block_row / 2 * shape_.score_row;
    float* pair_scores = scores + block_row / 2 * shape_.score_row;
    for (int64_t at = 0; at < vectors * kLanes; at += 2 * kLanes) {
      Vec p[2], ds[2];
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        const Gradient low = differentiate(weight[r] + at, score[r] + at, inverse[r], delta[r]);
        const Gradient high =
            differentiate(weight[r] + at + kLanes, score[r] + at + kLanes, inverse[r], delta[r]);
        p[r] = to_bf16(low.weight, high.weight);
        ds[r] = to_bf16(low.score, high.score);
        store(by_row[r] + at / 2, ds[r]);
      }
      store_pairs(pair_weights + at, interleave(p[0], p[1]));
      store_pairs(pair_scores + at, interleave(ds[0], ds[1]));
    }
    clear(pair_weights, vectors, all_vectors);
    clear(pair_scores, vectors, all_vectors);
    for (float* to : by_row) {
      clear(to, divide_up(vectors, 2), divide_up(all_vectors, 2));
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
