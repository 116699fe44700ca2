// Attention forward.
//
//     out = softmax(scale * Q K^T + mask) V,   lse = log sum exp(scale * Q K^T + mask)
//
// A task owns a run of query blocks (24 rows each, of one head) of one batch entry and key-value
// head: with grouped queries, of any head of the group. It walks over the keys in panels. A panel's
// keys and values are copied once into the layouts of register_tile.h and stay in the second-level
// cache while all blocks of the task pass over them; the scores of a block (24 rows by one panel)
// never leave it either. Panels hold up to 1024 keys, so most sequences are one panel: the softmax
// of a row is then computed whole, and the output is normalised where it is stored. Over several
// panels the blocks keep running maxima, sums and unnormalised outputs (online softmax).
//
// Keys that a row does not see (past its length, or by causality) are skipped by the block where no
// row sees them and hidden where some do; masks are added to the scores in cache.
//
// bf16 multiplies in pairs with float sums where the machine can; otherwise 16-bit inputs become
// floats as they are packed. Bytes moved: each operand once for a task, out and lse once.
#pragma once

#include "attention_view.h"

namespace patchgen_fast {
namespace {

constexpr int64_t kBlockRows = 24;       // a multiple of the tiles' 8, 6 and 4 rows
constexpr int64_t kStatRows = 32;        // rows of a block's statistics: whole vectors of them
constexpr int64_t kPanelKeys = 1024;     // longest run of keys with one softmax
constexpr int64_t kPanelFloats = 65536;  // keys or values of a panel: 256 KiB
constexpr int64_t kStateBlocks = 40;     // blocks of a task that keep their state over panels

// Sizes that follow from the problem alone.
template <class Math>
struct ForwardShape {
  explicit ForwardShape(const AttentionForward& problem)
      : steps(divide_up(problem.dim, Math::kGroup)),
        query_row(round_up(steps, kLanes)),
        columns(round_up(problem.dim, kLanes)),
        panels(larger(1, divide_up(problem.keys, panel_limit(columns)))),
        panel(round_up(larger(1, divide_up(problem.keys, panels)), kLanes)),
        score_row(panel + kLanes),  // the rows of a tile fall into different cache sets
        blocks_per_head(divide_up(problem.queries, kBlockRows)),
        blocks(blocks_per_head * (problem.heads / larger(1, problem.kv_heads))) {}

  static int64_t panel_limit(int64_t columns) {
    return smaller(kPanelKeys, kPanelFloats * Math::kGroup / columns);
  }

  int64_t steps;      // of the products over dim, in units
  int64_t query_row;  // units of a packed query row
  int64_t columns;    // floats of an output row, units of a packed value row
  int64_t panels;
  int64_t panel;  // keys of a panel
  int64_t score_row;
  int64_t blocks_per_head;
  int64_t blocks;  // of one key-value head
};

// A task's memory, cut from its thread's scratch; with a null base, only `bytes` has a meaning.
template <class Math>
struct ForwardWorkspace {
  ForwardWorkspace(const ForwardShape<Math>& shape, int64_t chunk, void* base) {
    const int64_t states = shape.panels > 1 ? chunk : 0;
    base_ = static_cast<unsigned char*>(base);
    keys = take(shape.panel * shape.steps);
    values = take(divide_up(shape.panel, Math::kGroup) * shape.columns);
    queries = take(kBlockRows * shape.query_row);
    scores = take(kBlockRows * shape.score_row);
    lane_maxima = take(kBlockRows * kLanes);
    product = take(kBlockRows * shape.columns);
    maxima = take(larger(1, states) * kStatRows);
    sums = take(larger(1, states) * kStatRows);
    state = take(states * kBlockRows * shape.columns);
  }

  float* take(int64_t floats) {
    float* here = reinterpret_cast<float*>(base_ + bytes);
    bytes += static_cast<size_t>(round_up(floats * 4, 64));
    return here;
  }

  float *keys, *values, *queries, *scores, *lane_maxima, *product, *maxima, *sums, *state;
  size_t bytes = 0;

 private:
  unsigned char* base_;
};

inline HeadView task_view(const AttentionForward& problem, const AttentionPlan& plan,
                          int64_t task) {
  return HeadView(problem, task / plan.chunks / problem.kv_heads,
                  task / plan.chunks % problem.kv_heads);
}

// Keys in one sum of weighted values. Where values share a sign, one sum over 197 and 512 keys
// erred 1.6 and 2.5 times as much as torch's product; runs of this length err less than it.
constexpr int64_t kWeighingRun = 128;

// What rounding the result to Element hides.
template <class Element>
constexpr bool kRoundedAway = sizeof(Element) < sizeof(float);

template <class Math, class Element>
class ForwardTask {
 public:
  ForwardTask(const AttentionForward& problem, const AttentionPlan& plan, int64_t task,
              void* scratch)
      : problem_(problem),
        shape_(problem),
        work_(shape_, plan.chunk, scratch),
        view_(task_view(problem, plan, task)),
        next_view_(task_view(problem, plan, smaller(task + 1, plan.tasks - 1))),
        first_block_(task % plan.chunks * plan.chunk),
        last_block_(smaller(first_block_ + plan.chunk, shape_.blocks)) {}

  void run() {
    for (int64_t index = 0; index < shape_.panels; ++index) {
      const KeyPanel panel = view_.panel(index * shape_.panel, shape_.panel);
      if (index > 0 && panel.keys == 0) {
        break;
      }
      pack(panel);
      for (int64_t block = first_block_; block < last_block_; ++block) {
        look_ahead(index, block);
        attend(block_at(block), panel);
        ahead_.finish();
      }
    }
    if (shape_.panels > 1) {
      for (int64_t block = first_block_; block < last_block_; ++block) {
        const Block b = block_at(block);
        finish(b, b.state);
      }
    }
  }

 private:
  // Query rows, and where their running values are kept.
  struct Block : QueryRows {
    float *maxima, *sums, *state;
  };

  Block block_at(int64_t index) const {
    const int64_t slot = shape_.panels > 1 ? index - first_block_ : 0;
    Block block;
    block.head =
        view_.kv_head * (problem_.heads / problem_.kv_heads) + index / shape_.blocks_per_head;
    block.query = index % shape_.blocks_per_head * kBlockRows;
    block.rows = smaller(kBlockRows, problem_.queries - block.query);
    block.maxima = work_.maxima + slot * kStatRows;
    block.sums = work_.sums + slot * kStatRows;
    block.state = work_.state + slot * kBlockRows * shape_.columns;
    return block;
  }

  // What to bring in while a block is computed: its rows of out, the next block's queries, and its
  // share of the keys and values of the panel that comes after this one.
  void look_ahead(int64_t panel, int64_t block) {
    if (shape_.panels == 1) {
      const Block now = block_at(block);
      const AttentionTensor out = view_.result(problem_.out, problem_.heads, problem_.queries);
      view_.bring<Element>(ahead_, out, now.head, now.query, now.rows);
    }
    if (block + 1 < last_block_) {
      const Block next = block_at(block + 1);
      view_.bring<Element>(ahead_, problem_.query, next.head, next.query, next.rows);
    }
    const bool last_panel = panel + 1 == shape_.panels;
    const HeadView& view = last_panel ? next_view_ : view_;
    const int64_t first = last_panel ? 0 : (panel + 1) * shape_.panel;
    view.bring_share<Element>(ahead_, problem_.key, problem_.value, view.panel(first, shape_.panel),
                              block - first_block_, last_block_ - first_block_);
  }

  void pack(const KeyPanel& panel) {
    const AttentionTensor& key = problem_.key;
    const AttentionTensor& value = problem_.value;
    pack_keys<Math>(view_.element<Element>(key, view_.kv_head, panel.first), key.token, panel.keys,
                    problem_.dim, work_.keys);
    pack_values<Math>(view_.element<Element>(value, view_.kv_head, panel.first), value.token,
                      panel.keys, problem_.dim, work_.values, shape_.columns);
  }

  void attend(const Block& block, const KeyPanel& panel) {
    const int64_t keys = view_.visible(block, panel);
    if (panel.first == 0) {
      reset(block);
    } else if (keys == 0) {
      return;
    }
    const Scores scores = score(block, panel, keys);
    const float factor = view_.to_natural * kLog2e;
    if (shape_.panels == 1) {
      softmax_block<Math>(scores, block.rows, factor, block.maxima, block.sums);
      weigh(block, keys);
      finish(block, work_.product);
    } else {
      float old_maxima[kStatRows], new_sums[kStatRows] = {};
      __builtin_memcpy(old_maxima, block.maxima, sizeof(old_maxima));
      softmax_block<Math>(scores, block.rows, factor, block.maxima, new_sums);
      weigh(block, keys);
      join(block, factor, old_maxima, new_sums);
    }
  }

  void reset(const Block& block) {
    for (int64_t r = 0; r < kStatRows; r += kLanes) {
      store(block.maxima + r, broadcast(kMinusInfinity));
      store(block.sums + r, Vec{});
    }
    if (shape_.panels > 1) {
      __builtin_memset(block.state, 0, sizeof(float) * kBlockRows * shape_.columns);
    }
  }

  // sign(scale) * Q K^T, masked
  Scores score(const Block& block, const KeyPanel& panel, int64_t keys) {
    const Units queries = rows_as_units<Math>(
        view_.element<Element>(problem_.query, block.head, block.query), problem_.query.token,
        block.rows, problem_.dim, view_.sign, work_.queries, shape_.query_row);
    for (int64_t r = 0; r < block.rows; ++r) {
      store(work_.lane_maxima + r * kLanes, broadcast(kMinusInfinity));
    }
    const int64_t raised = multiply_keys<Math>(queries, block.rows, work_.keys, panel.keys, keys,
                                               shape_.steps, work_.scores, shape_.score_row,
                                               view_.seen_by_all(block, panel), work_.lane_maxima);
    view_.mask(block, panel, work_.scores, shape_.score_row);
    return {work_.scores, shape_.score_row, divide_up(keys, kLanes), work_.lane_maxima, raised};
  }

  // product = P V. Weights have one sign, and values may: then a sum only grows, and its rounding
  // errors with it. In float32 it is made of even runs of at most kWeighingRun keys.
  void weigh(const Block& block, int64_t keys) {
    const int64_t steps = divide_up(keys, Math::kGroup);
    const int64_t runs = kRoundedAway<Element> ? 1 : larger(1, divide_up(steps, kWeighingRun));
    const int64_t run = divide_up(steps, runs);
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t first = i * run;
      multiply_rows<Math>({work_.scores + first, shape_.score_row}, block.rows,
                          work_.values + first * shape_.columns, shape_.columns,
                          smaller(run, steps - first), work_.product, i > 0, &ahead_);
    }
  }

  // state = state * decay + product, and the same for the sums.
  void join(const Block& block, float factor, const float* old_maxima, const float* new_sums) {
    float decay[kStatRows];
    for (int64_t r = 0; r < kStatRows; r += kLanes) {
      // A row that has seen no key before has sum and state 0: any finite decay will do.
      const Vec before = load(old_maxima + r);
      const Vec fall = before - load(block.maxima + r);
      const Vec kept =
          select(before == kMinusInfinity, Vec{}, exp2_scaled(fall, broadcast(factor)));
      store(decay + r, kept);
      store(block.sums + r, fma(load(block.sums + r), kept, load(new_sums + r)));
    }
    for (int64_t r = 0; r < block.rows; ++r) {
      float* state = block.state + r * shape_.columns;
      const float* product = work_.product + r * shape_.columns;
      for (int64_t d = 0; d < shape_.columns; d += kLanes) {
        store(state + d, fma(load(state + d), broadcast(decay[r]), load(product + d)));
      }
    }
  }

  // Normalises `rows` into out, and writes lse.
  void finish(const Block& block, const float* rows) {
    float inverse[kStatRows];
    float* lse = problem_.lse + problem_.lse_row(view_.batch, block.head, block.query);
    for (int64_t r = 0; r < block.rows; r += kLanes) {
      const Vec sum = load(block.sums + r);
      store(inverse + r, select(sum == 0.0f, Vec{}, broadcast(1.0f) / sum));
      store_up_to(lse + r, log_sum_exp(load(block.maxima + r), sum, view_.to_natural),
                  block.rows - r);
    }
    const int64_t token = problem_.heads * problem_.dim;
    Element* out = static_cast<Element*>(problem_.out) +
                   (view_.batch * problem_.queries + block.query) * token +
                   block.head * problem_.dim;
    for (int64_t r = 0; r < block.rows; ++r, rows += shape_.columns, out += token) {
      store_row(out, rows, problem_.dim, inverse[r]);
    }
  }

  const AttentionForward& problem_;
  const ForwardShape<Math> shape_;
  const ForwardWorkspace<Math> work_;
  const HeadView view_, next_view_;  // of this task, and of the one that the thread has next
  const int64_t first_block_, last_block_;
  Prefetch ahead_;
};

// Enough tasks to even out the threads' loads, none so short that copying its keys and values
// (once a task) shows beside the products.
template <class Math>
AttentionPlan forward_plan(const AttentionForward& problem, int64_t threads) {
  constexpr int64_t kTasksPerThread = 4;
  constexpr int64_t kLeastBlocks = 4;
  const ForwardShape<Math> shape(problem);
  const int64_t groups = problem.batch * problem.kv_heads;
  AttentionPlan plan{};
  if (groups == 0 || shape.blocks == 0) {
    return plan;
  }
  const int64_t wanted = threads == 1 ? 1 : divide_up(kTasksPerThread * threads, groups);
  const int64_t pieces = smaller(wanted, larger(1, shape.blocks / kLeastBlocks));
  plan.chunk = divide_up(shape.blocks, pieces);
  if (shape.panels > 1) {
    plan.chunk = smaller(plan.chunk, kStateBlocks);
  }
  plan.chunks = divide_up(shape.blocks, plan.chunk);
  plan.tasks = groups * plan.chunks;
  plan.scratch_bytes = ForwardWorkspace<Math>(shape, plan.chunk, nullptr).bytes;
  return plan;
}

AttentionPlan attention_plan(const AttentionForward& problem, int64_t threads) {
  return problem.dtype == Dtype::bfloat16 ? forward_plan<Bf16Math>(problem, threads)
                                          : forward_plan<FloatMath>(problem, threads);
}

void attention_forward(const AttentionForward& problem, const AttentionPlan& plan, int64_t task,
                       void* scratch) {
  switch (problem.dtype) {
    case Dtype::float32:
      return ForwardTask<FloatMath, float>(problem, plan, task, scratch).run();
    case Dtype::bfloat16:
      return ForwardTask<Bf16Math, BFloat16>(problem, plan, task, scratch).run();
    default:
      return ForwardTask<FloatMath, Float16>(problem, plan, task, scratch).run();
  }
}

}  // namespace
}  // namespace patchgen_fast
