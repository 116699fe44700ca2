// Gradient of an additive attention mask: dS, summed over whatever the mask was broadcast.
//
// A task owns one batch entry and head of the mask (of which a broadcast dimension has one) and a
// block of its query rows, or all where the mask has but one row; it recomputes dS of everything
// that this part of the mask was added to, panel by panel, and sums in a fixed order. That repeats
// two of the backward's five products, and spares partial sums of the size of all scores.
#pragma once

#include "attention_gradient.h"

namespace patchgen_fast {
namespace {

template <class Math, class Element>
class MaskGradientTask {
 public:
  MaskGradientTask(const AttentionBackward& problem, int64_t task, Carver& carver)
      : problem_(problem),
        shape_(problem),
        gradient_(problem, shape_, carver, false),
        one_row_(problem.mask_queries == 1),
        blocks_(one_row_ ? 1 : shape_.blocks_per_head),
        block_(task % blocks_),
        head_(task / blocks_ % problem.mask_heads),
        batch_(task / blocks_ / problem.mask_heads) {
    sums_ = carver.floats((one_row_ ? 1 : shape_.rows) * shape_.score_row);
    totals_ = carver.floats(shape_.rows);
  }

  int64_t tasks() const { return problem_.mask_batch * problem_.mask_heads * blocks_; }

  void run() {
    const int64_t rows = mask_rows();
    __builtin_memset(totals_, 0, sizeof(float) * static_cast<size_t>(shape_.rows));
    for (int64_t index = 0; index < shape_.panels; ++index) {
      const int64_t first = index * shape_.panel;
      __builtin_memset(sums_, 0, sizeof(float) * static_cast<size_t>(rows * shape_.score_row));
      add_batch(first);
      const int64_t keys = smaller(shape_.panel, problem_.keys - first);
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = sums_ + r * shape_.score_row;
        if (problem_.mask_keys == 1) {
          totals_[r] += sum_of(row, keys);
        } else {
          store_sums(row, r, first, keys);
        }
      }
    }
    if (problem_.mask_keys == 1) {
      for (int64_t r = 0; r < rows; ++r) {
        store_sums(totals_ + r, r, 0, 1);
      }
    }
  }

 private:
  int64_t mask_rows() const {
    return one_row_ ? 1 : shape_.block(0, block_, problem_.queries).rows;
  }

  static float sum_of(const float* row, int64_t keys) {
    Vec sum{};
    for (int64_t j = 0; j < keys; j += kLanes) {
      sum += load_up_to(row + j, keys - j);
    }
    return sum_lanes(sum);
  }

  void add_batch(int64_t first) {
    const int64_t one_batch = problem_.mask_batch == 1;
    for (int64_t b = one_batch ? 0 : batch_; b < (one_batch ? problem_.batch : batch_ + 1); ++b) {
      const bool one_head = problem_.mask_heads == 1;
      int64_t packed = -1;
      for (int64_t h = one_head ? 0 : head_; h < (one_head ? problem_.heads : head_ + 1); ++h) {
        const HeadView view(problem_, b, h / (problem_.heads / problem_.kv_heads));
        const KeyPanel panel = view.panel(first, smaller(shape_.panel, problem_.keys - first));
        if (packed != view.kv_head) {
          gradient_.pack(view, panel);
          packed = view.kv_head;
        }
        add_head(view, h, panel);
      }
    }
  }

  void add_head(const HeadView& view, int64_t head, const KeyPanel& panel) {
    const int64_t begin = one_row_ ? 0 : block_;
    const int64_t end = one_row_ ? shape_.blocks_per_head : block_ + 1;
    for (int64_t block = begin; block < end; ++block) {
      const QueryRows rows = shape_.block(head, block, problem_.queries);
      const int64_t keys = round_up(view.visible(rows, panel), kLanes);
      gradient_.compute(view, rows, panel);
      const int64_t together = one_row_ ? rows.rows : 1;
      for (int64_t r = 0; r < rows.rows; r += together) {
        float* sums = sums_ + (one_row_ ? 0 : r) * shape_.score_row;
        add_rows(sums, gradient_.scores + r * shape_.score_row, together, keys);
      }
    }
  }

  // Rows that have one sum are added up by themselves first: the long sum then rounds less often.
  void add_rows(float* sums, const float* scores, int64_t rows, int64_t keys) const {
    for (int64_t j = 0; j < keys; j += kLanes) {
      Vec sum = load(scores + j);
      for (int64_t r = 1; r < rows; ++r) {
        sum += load(scores + r * shape_.score_row + j);
      }
      store(sums + j, load(sums + j) + sum);
    }
  }

  void store_sums(const float* from, int64_t row, int64_t key, int64_t keys) {
    const int64_t query = one_row_ ? 0 : block_ * shape_.rows + row;
    const int64_t at = ((batch_ * problem_.mask_heads + head_) * problem_.mask_queries + query) *
                           problem_.mask_keys +
                       key;
    switch (problem_.mask.dtype) {
      case Dtype::float32:
        return store_row(static_cast<float*>(problem_.grad_mask) + at, from, keys, 1.0f);
      case Dtype::bfloat16:
        return store_row(static_cast<BFloat16*>(problem_.grad_mask) + at, from, keys, 1.0f);
      default:
        return store_row(static_cast<Float16*>(problem_.grad_mask) + at, from, keys, 1.0f);
    }
  }

  const AttentionBackward& problem_;
  const GradientShape<Math> shape_;
  ScoreGradient<Math, Element> gradient_;
  const bool one_row_;    // the mask has one row for all queries
  const int64_t blocks_;  // tasks of one head of the mask
  const int64_t block_, head_, batch_;
  float *sums_, *totals_;
};

template <class Math, class Element>
AttentionPlan mask_gradient_plan(const AttentionBackward& problem) {
  AttentionPlan plan{};
  if (problem.batch * problem.heads * problem.queries > 0) {
    Carver carver(nullptr);
    plan.tasks = MaskGradientTask<Math, Element>(problem, 0, carver).tasks();
    plan.scratch_bytes = carver.bytes();
  }
  return plan;
}

AttentionPlan attention_mask_gradient_plan(const AttentionBackward& problem) {
  return problem.dtype == Dtype::bfloat16 ? mask_gradient_plan<Bf16Math, BFloat16>(problem)
                                          : mask_gradient_plan<FloatMath, float>(problem);
}

template <class Math, class Element>
void run_mask_gradient(const AttentionBackward& problem, int64_t task, void* scratch) {
  Carver carver(scratch);
  MaskGradientTask<Math, Element>(problem, task, carver).run();
}

void attention_mask_gradient(const AttentionBackward& problem, int64_t task, void* scratch) {
  switch (problem.dtype) {
    case Dtype::float32:
      return run_mask_gradient<FloatMath, float>(problem, task, scratch);
    case Dtype::bfloat16:
      return run_mask_gradient<Bf16Math, BFloat16>(problem, task, scratch);
    default:
      return run_mask_gradient<FloatMath, Float16>(problem, task, scratch);
  }
}

}  // namespace
}  // namespace patchgen_fast
