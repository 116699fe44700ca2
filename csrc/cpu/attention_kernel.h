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

#include "attention_softmax.h"

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

  float *keys, *values, *queries, *scores, *product, *maxima, *sums, *state;
  size_t bytes = 0;

 private:
  unsigned char* base_;
};

template <class Math, class Element>
class ForwardTask {
 public:
  ForwardTask(const AttentionForward& problem, const AttentionPlan& plan, int64_t task,
              void* scratch)
      : problem_(problem), shape_(problem), work_(shape_, plan.chunk, scratch) {
    const int64_t group = task / plan.chunks;
    batch_ = group / problem.kv_heads;
    kv_head_ = group % problem.kv_heads;
    first_block_ = task % plan.chunks * plan.chunk;
    last_block_ = smaller(first_block_ + plan.chunk, shape_.blocks);
    length_ = problem.keys;
    if (problem.kv_lengths != nullptr) {
      length_ = larger(0, smaller(length_, problem.kv_lengths[batch_]));
    }
    offset_ = problem.query_offset == nullptr ? 0 : problem.query_offset[batch_];
    const float scale = problem.scale;
    sign_ = scale == 0 ? 0.0f : scale < 0 ? -1.0f : 1.0f;
    magnitude_ = scale == 0 ? 1.0f : scale < 0 ? -scale : scale;
    additive_ = problem.mask.data != nullptr && problem.mask.dtype != Dtype::boolean;
  }

  void run() {
    for (int64_t panel = 0; panel < shape_.panels; ++panel) {
      panel_first_ = panel * shape_.panel;
      panel_keys_ = larger(0, smaller(shape_.panel, length_ - panel_first_));
      if (panel > 0 && panel_keys_ == 0) {
        break;
      }
      pack_panel();
      for (int64_t block = first_block_; block < last_block_; ++block) {
        attend(block_at(block), panel == 0);
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
  // Rows [query, query + rows) of one head, and where their running values are kept.
  struct Block {
    int64_t head, query, rows;
    float *maxima, *sums, *state;
  };

  Block block_at(int64_t index) const {
    const int64_t slot = shape_.panels > 1 ? index - first_block_ : 0;
    Block block;
    block.head = kv_head_ * (problem_.heads / problem_.kv_heads) + index / shape_.blocks_per_head;
    block.query = index % shape_.blocks_per_head * kBlockRows;
    block.rows = smaller(kBlockRows, problem_.queries - block.query);
    block.maxima = work_.maxima + slot * kStatRows;
    block.sums = work_.sums + slot * kStatRows;
    block.state = work_.state + slot * kBlockRows * shape_.columns;
    return block;
  }

  const Element* element(const AttentionTensor& tensor, int64_t head, int64_t token) const {
    return static_cast<const Element*>(tensor.data) + batch_ * tensor.batch + head * tensor.head +
           token * tensor.token;
  }

  void pack_panel() {
    const AttentionTensor& key = problem_.key;
    const AttentionTensor& value = problem_.value;
    pack_keys<Math>(element(key, kv_head_, panel_first_), key.token, panel_keys_, problem_.dim,
                    work_.keys);
    pack_values<Math>(element(value, kv_head_, panel_first_), value.token, panel_keys_,
                      problem_.dim, work_.values, shape_.columns);
  }

  // Keys of this panel that a query sees: always the first ones.
  int64_t visible(int64_t query) const {
    const int64_t end = problem_.is_causal ? query + offset_ + 1 - panel_first_ : panel_keys_;
    return larger(0, smaller(panel_keys_, end));
  }

  void attend(const Block& block, bool first_panel) {
    const int64_t keys = visible(block.query + block.rows - 1);
    if (first_panel) {
      reset(block);
    } else if (keys == 0) {
      return;
    }
    const int64_t vectors = divide_up(keys, kLanes);
    score(block, vectors);
    mask(block, keys, vectors);
    const float factor = (additive_ ? 1.0f : magnitude_) * kLog2e;
    if (shape_.panels == 1) {
      softmax_block<Math>(work_.scores, shape_.score_row, block.rows, vectors, factor, block.maxima,
                          block.sums);
      weigh(block, keys);
      finish(block, work_.product);
    } else {
      float old_maxima[kStatRows], new_sums[kStatRows] = {};
      __builtin_memcpy(old_maxima, block.maxima, sizeof(old_maxima));
      softmax_block<Math>(work_.scores, shape_.score_row, block.rows, vectors, factor, block.maxima,
                          new_sums);
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

  // scores = sign(scale) * Q K^T
  void score(const Block& block, int64_t vectors) {
    pack_rows<Math>(element(problem_.query, block.head, block.query), problem_.query.token,
                    block.rows, problem_.dim, sign_, work_.queries, shape_.query_row);
    const int64_t panel_vectors = divide_up(panel_keys_, kLanes);
    const float* keys = work_.keys;
    for (int64_t first = 0; first < vectors;) {
      const int64_t width = tile_vectors(panel_vectors - first);
      multiply_in_runs<Math>(work_.queries, shape_.query_row, block.rows, keys, width * kLanes,
                             smaller(width, vectors - first), shape_.steps,
                             work_.scores + first * kLanes, shape_.score_row);
      keys += width * kLanes * shape_.steps;
      first += width;
    }
  }

  void mask(const Block& block, int64_t keys, int64_t vectors) {
    const AttentionMask& mask = problem_.mask;
    if (mask.data != nullptr) {
      const int64_t first = batch_ * mask.batch + block.head * mask.head +
                            block.query * mask.query + panel_first_ * mask.key;
      apply_mask(work_.scores, shape_.score_row, block.rows, keys, mask, first, magnitude_);
    }
    for (int64_t r = 0; r < block.rows; ++r) {
      hide_keys_from(work_.scores + r * shape_.score_row, visible(block.query + r), vectors);
    }
  }

  // product = P V
  void weigh(const Block& block, int64_t keys) {
    const int64_t vectors = shape_.columns / kLanes;
    for (int64_t first = 0; first < vectors;) {
      const int64_t width = tile_vectors(vectors - first);
      multiply<Math>(work_.scores, shape_.score_row, block.rows, work_.values + first * kLanes,
                     shape_.columns, width, divide_up(keys, Math::kGroup),
                     work_.product + first * kLanes, shape_.columns);
      first += width;
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
    const float to_natural = additive_ ? 1.0f : magnitude_;
    float* lse =
        problem_.lse + (batch_ * problem_.heads + block.head) * problem_.queries + block.query;
    for (int64_t r = 0; r < block.rows; r += kLanes) {
      const Vec sum = load(block.sums + r);
      store(inverse + r, select(sum == 0.0f, Vec{}, broadcast(1.0f) / sum));
      store_up_to(lse + r, log_sum_exp(load(block.maxima + r), sum, to_natural), block.rows - r);
    }
    const int64_t token = problem_.heads * problem_.dim;
    Element* out = static_cast<Element*>(problem_.out) +
                   (batch_ * problem_.queries + block.query) * token + block.head * problem_.dim;
    for (int64_t r = 0; r < block.rows; ++r, rows += shape_.columns, out += token) {
      for (int64_t d = 0; d < problem_.dim; d += kLanes) {
        store_up_to(out + d, load(rows + d) * broadcast(inverse[r]), problem_.dim - d);
      }
    }
  }

  const AttentionForward& problem_;
  const ForwardShape<Math> shape_;
  const ForwardWorkspace<Math> work_;
  int64_t batch_, kv_head_, first_block_, last_block_;
  int64_t length_, offset_;  // keys of this batch entry; causal diagonal
  int64_t panel_first_ = 0, panel_keys_ = 0;
  float sign_, magnitude_;  // of scale; 0 counts as 0 * 1
  bool additive_;
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

using Bf16Math = std::conditional_t<kHasBf16Dot, PairMath, FloatMath>;

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
