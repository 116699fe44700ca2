// Attention backward: gradients of query, key and value.
//
//     dV = P^T dO      dK = scale * dS^T Q      dQ = scale * dS K      (attention_gradient.h: P,
//     dS)
//
// A task owns one batch entry and key-value head: its keys' and values' gradients, and those of all
// queries that attend to them. Nothing is shared between tasks, so there are no atomics and the
// result does not depend on threads. Keys go in panels whose copies (K and V transposed, K by rows)
// and gradients stay in the second-level cache while all blocks of query rows pass over them. One
// panel suffices to about 256 keys; over several, the queries' gradients are gathered as floats in
// scratch. Five products a block; bytes moved: each operand and gradient once, and once more the
// queries, dO and O for each panel after the first.
#pragma once

#include "attention_gradient.h"

namespace patchgen_fast {
namespace {

inline HeadView task_view(const AttentionBackward& problem, int64_t task) {
  return HeadView(problem, task / problem.kv_heads, task % problem.kv_heads);
}

template <class Math, class Element>
class BackwardTask {
 public:
  BackwardTask(const AttentionBackward& problem, int64_t task, Carver& carver)
      : problem_(problem),
        shape_(problem),
        gradient_(problem, shape_, carver, true),
        view_(task_view(problem, task)),
        next_view_(task_view(problem, smaller(task + 1, problem.batch * problem.kv_heads - 1))),
        group_(problem.heads / problem.kv_heads) {
    key_rows_ = carver.floats(shape_.panel / Math::kGroup * shape_.columns);
    grad_key_ = carver.floats(shape_.panel * shape_.columns);
    grad_value_ = carver.floats(shape_.panel * shape_.columns);
    query_rows_ = carver.floats(shape_.rows * shape_.columns / Math::kGroup);
    grad_rows_ = carver.floats(shape_.rows * shape_.columns / Math::kGroup);
    const int64_t states = shape_.panels > 1 ? group_ * problem.queries : shape_.rows;
    grad_query_ = carver.floats(states * shape_.columns);
  }

  void run() {
    if (problem_.statistics != nullptr) {
      measure();
    } else if (shape_.panels > 1) {
      for (int64_t head = 0; head < group_; ++head) {
        gradient_.sum_outputs(view_, first_head() + head);
      }
    }
    if (shape_.panels > 1) {
      clear(grad_query_, group_ * problem_.queries);
    }
    for (int64_t index = 0; index < shape_.panels; ++index) {
      const KeyPanel panel = panel_at(view_, index);
      pack(panel);
      const bool cleared = clear_unseen(panel);
      for (int64_t block = 0; block < blocks(); ++block) {
        look_ahead(index, block);
        differentiate(block_at(block), panel, block > 0 || cleared);
        gradient_.ahead.finish();
      }
      store_keys(panel.first);
    }
    if (shape_.panels > 1) {
      for (int64_t head = 0; head < group_; ++head) {
        const QueryRows all{first_head() + head, 0, problem_.queries};
        store_queries(all, grad_query_ + head * problem_.queries * shape_.columns);
      }
    }
  }

 private:
  int64_t first_head() const { return view_.kv_head * group_; }

  int64_t blocks() const { return group_ * shape_.blocks_per_head; }

  QueryRows block_at(const HeadView& view, int64_t index) const {
    return shape_.block(view.kv_head * group_ + index / shape_.blocks_per_head,
                        index % shape_.blocks_per_head, problem_.queries);
  }

  QueryRows block_at(int64_t index) const { return block_at(view_, index); }

  KeyPanel panel_at(const HeadView& view, int64_t index) const {
    const int64_t first = index * shape_.panel;
    return view.panel(first, smaller(shape_.panel, problem_.keys - first));
  }

  // What to bring in while a block is computed: its rows of the queries' gradient, what the next
  // block reads, and a share of the panel's gradients and of the next panel's keys and values.
  void look_ahead(int64_t panel, int64_t block) {
    Prefetch& ahead = gradient_.ahead;
    const bool last_panel = panel + 1 == shape_.panels;
    if (last_panel) {
      const QueryRows now = block_at(block);
      view_.bring<Element>(ahead,
                           view_.result(problem_.grad_query, problem_.heads, problem_.queries),
                           now.head, now.query, now.rows);
    }
    const bool last_block = block + 1 == blocks();
    const HeadView& next_rows = last_block && last_panel ? next_view_ : view_;
    const QueryRows next = block_at(next_rows, last_block ? 0 : block + 1);
    next_rows.bring<Element>(ahead, problem_.query, next.head, next.query, next.rows);
    next_rows.bring<Element>(ahead, problem_.grad_out, next.head, next.query, next.rows);
    view_.bring_share<Element>(ahead,
                               view_.result(problem_.grad_key, problem_.kv_heads, problem_.keys),
                               view_.result(problem_.grad_value, problem_.kv_heads, problem_.keys),
                               panel_at(view_, panel), block, blocks());
    const HeadView& view = last_panel ? next_view_ : view_;
    view.bring_share<Element>(ahead, problem_.key, problem_.value,
                              panel_at(view, last_panel ? 0 : panel + 1), block, blocks());
  }

  void clear(float* rows, int64_t count) {
    __builtin_memset(rows, 0, sizeof(float) * static_cast<size_t>(count * shape_.columns));
  }

  void measure() {
    const int64_t count = group_ * problem_.queries;
    float* sums = problem_.statistics + view_.batch * problem_.heads * problem_.queries +
                  first_head() * problem_.queries;
    float* deltas = sums + problem_.batch * problem_.heads * problem_.queries;
    __builtin_memset(sums, 0, sizeof(float) * static_cast<size_t>(count));
    __builtin_memset(deltas, 0, sizeof(float) * static_cast<size_t>(count));
    for (int64_t index = 0; index < shape_.panels; ++index) {
      const KeyPanel panel = panel_at(view_, index);
      gradient_.pack(view_, panel);
      for (int64_t block = 0; block < blocks(); ++block) {
        gradient_.measure(view_, block_at(block), panel);
      }
    }
  }

  void pack(const KeyPanel& panel) {
    gradient_.pack(view_, panel);
    const AttentionTensor& key = problem_.key;
    pack_values<Math>(view_.element<Element>(key, view_.kv_head, panel.first), key.token,
                      panel.keys, problem_.dim, key_rows_, shape_.columns);
  }

  // The first block stores its part of the panel's gradients, the others add theirs; but where it
  // does not see all keys, they begin at 0.
  bool clear_unseen(const KeyPanel& panel) {
    const int64_t keys = smaller(shape_.panel, problem_.keys - panel.first);
    if (blocks() > 0 && view_.visible(block_at(0), panel) == keys) {
      return false;
    }
    clear(grad_key_, keys);
    clear(grad_value_, keys);
    return true;
  }

  void pack_across(const AttentionTensor& tensor, const QueryRows& rows, float* to) {
    pack_values<Math>(view_.element<Element>(tensor, rows.head, rows.query), tensor.token,
                      rows.rows, problem_.dim, to, shape_.columns);
  }

  // `add`: to what blocks before have left of the panel's gradients.
  void differentiate(const QueryRows& rows, const KeyPanel& panel, bool add) {
    const int64_t keys = view_.visible(rows, panel);
    if (keys == 0 && shape_.panels > 1) {
      return;
    }
    gradient_.compute(view_, rows, panel);
    pack_across(problem_.grad_out, rows, grad_rows_);
    pack_across(problem_.query, rows, query_rows_);
    const int64_t steps = divide_up(rows.rows, Math::kGroup);
    multiply_rows<Math>(gradient_.across(gradient_.weights), keys, grad_rows_, shape_.columns,
                        steps, grad_value_, add, &gradient_.ahead);
    multiply_rows<Math>(gradient_.across(gradient_.scores), keys, query_rows_, shape_.columns,
                        steps, grad_key_, add, &gradient_.ahead);
    float* grad_query = grad_query_;
    if (shape_.panels > 1) {
      const int64_t row = (rows.head - first_head()) * problem_.queries + rows.query;
      grad_query += row * shape_.columns;
    }
    multiply_rows<Math>(gradient_.by_row(), rows.rows, key_rows_, shape_.columns,
                        divide_up(keys, Math::kGroup), grad_query, shape_.panels > 1,
                        &gradient_.ahead);
    if (shape_.panels == 1) {
      store_queries(rows, grad_query);
    }
  }

  void store_queries(const QueryRows& rows, const float* from) {
    const int64_t token = problem_.heads * problem_.dim;
    Element* to = static_cast<Element*>(problem_.grad_query) +
                  (view_.batch * problem_.queries + rows.query) * token + rows.head * problem_.dim;
    for (int64_t r = 0; r < rows.rows; ++r) {
      store_row(to + r * token, from + r * shape_.columns, problem_.dim, problem_.scale);
    }
  }

  void store_keys(int64_t first) {
    const int64_t token = problem_.kv_heads * problem_.dim;
    const int64_t offset =
        (view_.batch * problem_.keys + first) * token + view_.kv_head * problem_.dim;
    Element* key = static_cast<Element*>(problem_.grad_key) + offset;
    Element* value = static_cast<Element*>(problem_.grad_value) + offset;
    const int64_t keys = smaller(shape_.panel, problem_.keys - first);
    for (int64_t k = 0; k < keys; ++k) {
      store_row(key + k * token, grad_key_ + k * shape_.columns, problem_.dim, problem_.scale);
      store_row(value + k * token, grad_value_ + k * shape_.columns, problem_.dim, 1.0f);
    }
  }

  const AttentionBackward& problem_;
  const GradientShape<Math> shape_;
  ScoreGradient<Math, Element> gradient_;
  const HeadView view_, next_view_;  // of this task, and of the one that the thread has next
  const int64_t group_;              // query heads of the key-value head
  float *key_rows_, *grad_key_, *grad_value_, *query_rows_, *grad_rows_, *grad_query_;
};

template <class Math, class Element>
void run_backward(const AttentionBackward& problem, int64_t task, void* scratch) {
  Carver carver(scratch);
  BackwardTask<Math, Element>(problem, task, carver).run();
}

template <class Math, class Element>
AttentionPlan backward_plan(const AttentionBackward& problem) {
  AttentionPlan plan{};
  plan.tasks = problem.batch * problem.kv_heads;
  if (plan.tasks > 0) {
    Carver carver(nullptr);
    BackwardTask<Math, Element>(problem, 0, carver);
    plan.scratch_bytes = carver.bytes();
    const bool measured = GradientShape<Math>(problem).measured(problem);
    plan.workspace = measured ? 2 * problem.batch * problem.heads * problem.queries : 0;
  }
  return plan;
}

AttentionPlan attention_backward_plan(const AttentionBackward& problem) {
  return problem.dtype == Dtype::bfloat16 ? backward_plan<Bf16Math, BFloat16>(problem)
                                          : backward_plan<FloatMath, float>(problem);
}

void attention_backward(const AttentionBackward& problem, int64_t task, void* scratch) {
  switch (problem.dtype) {
    case Dtype::float32:
      return run_backward<FloatMath, float>(problem, task, scratch);
    case Dtype::bfloat16:
      return run_backward<Bf16Math, BFloat16>(problem, task, scratch);
    default:
      return run_backward<FloatMath, Float16>(problem, task, scratch);
  }
}

}  // namespace
}  // namespace patchgen_fast
