// The gradient of a weight: a product over all tokens, of gradients and inputs.
//
//     out[rows, columns] = left[depth, rows]^T @ right[depth, columns]
//
// The tokens are cut into stages of kStageGroups groups. In a stage, pack tasks turn kPackRows
// tokens of `right` each into their part of all panels (images are cut into patches on the way);
// then each task transposes its columns of `left` into a block of A and multiplies. Sums over the
// stages are floats in memory, added in the order of the stages whatever the threads do: the result
// is the same bits every time. Bytes moved a stage: its tokens twice, the sums twice.
#pragma once

#include "gemm_gather.h"
#include "gemm_kernel.h"
#include "gemm_outer.h"
#include "patch_embed_gather.h"

namespace patchgen_fast {
namespace {

constexpr int64_t kStageGroups = 1024;
constexpr int64_t kPackRows = 64;

// The stage that begins at token `first`.
template <class T>
static GemmPlan plan_outer(const OuterProduct& o, int64_t first, int64_t threads) {
  using Operand = typename OperandFor<T>::type;
  const int64_t depth = smaller(o.depth - first, kStageGroups * Operand::kGroup);
  GemmPlan plan =
      plan_gemm<Operand>(o.rows, o.columns, depth, threads, sizeof(RowTarget<float, float>));
  plan.scratch_bytes += static_cast<size_t>(depth) * sizeof(void*);
  plan.pack_tasks = divide_up(depth, kPackRows);
  if (o.right == nullptr) {
    const size_t row_bytes = static_cast<size_t>(block_stride(o.columns)) * sizeof(Word);
    plan.pack_scratch_bytes = kPackRows * row_bytes + gather_scratch_bytes(o.patches.grid);
  }
  return plan;
}

template <class Operand, class Element>
static void pack_tokens(const OuterProduct& o, const GemmPlan& plan, int64_t task,
                        const Element* tokens, int64_t ld) {
  const int64_t first = task * kPackRows;
  const int64_t count = smaller(plan.depth - first, kPackRows);
  Word* packed = static_cast<Word*>(o.packed);
  for (int64_t panel = 0; panel < plan.panels; ++panel) {
    pack_columns<Operand>(packed + panel_offset(plan, panel), plan, panel_column(plan, panel),
                          first / Operand::kGroup, tokens, ld, count);
  }
}

static void pack_no_bias(const OuterProduct& o, const GemmPlan& plan) {
  float* bias = reinterpret_cast<float*>(static_cast<Word*>(o.packed) + bias_offset(plan));
  for (int64_t i = 0; i < plan.panels * kPanelColumns; i += kLanes) {
    store(bias + i, Vec{});
  }
}

template <class T>
static void pack_outer(const OuterProduct& o, int64_t first, const GemmPlan& plan, int64_t task,
                       void* scratch) {
  using Operand = typename OperandFor<T>::type;
  using Element = typename Operand::Element;
  if (task == 0) {
    pack_no_bias(o, plan);
  }
  const int64_t token = first + task * kPackRows;
  if (o.right != nullptr) {
    const T* tokens = static_cast<const T*>(o.right) + token * o.columns;
    return pack_tokens<Operand>(o, plan, task, tokens, o.columns);
  }
  const int64_t stride = block_stride(divide_up(o.columns, Operand::kGroup));
  Word* rows = static_cast<Word*>(scratch);
  const int64_t count = smaller(plan.depth - task * kPackRows, kPackRows);
  gather_patches<T>(o.patches, token, count, rows, stride, rows + kPackRows * stride);
  pack_tokens<Operand>(o, plan, task, reinterpret_cast<const Element*>(rows),
                       stride * Operand::kGroup);
}

// The block's tiles go to `out`, on top of the sums so far unless this is the first stage.
template <class Operand, class Out>
static void multiply_stage(const OuterProduct& o, const GemmPlan& plan, const GemmTask& t,
                           const Word* a, void* target_space, Out* out, bool adds) {
  auto* targets = static_cast<RowTarget<Out, float>*>(target_space);
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t offset = (t.first_row + r) * o.columns;
    targets[r] = {out + offset, o.sums + offset};
  }
  const Word* packed = static_cast<const Word*>(o.packed);
  const float* zeros = reinterpret_cast<const float*>(packed + bias_offset(plan));
  const RowSink<Out, float> sink{targets, zeros, o.columns, adds};
  multiply_block<Operand>(plan, t, a, packed, true, sink);
}

template <class T>
static void run_outer(const OuterProduct& o, int64_t first, const GemmPlan& plan, int64_t task,
                      void* scratch) {
  using Operand = typename OperandFor<T>::type;
  const GemmTask t = gemm_task(plan, task);
  Word* a = static_cast<Word*>(scratch);
  void* targets = a + plan.rows_per_task * plan.stride;
  auto* rows =
      reinterpret_cast<const T**>(static_cast<RowTarget<T, float>*>(targets) + plan.rows_per_task);
  const RowsOf<T> left{static_cast<const T*>(o.left), o.rows, o.left_group, o.left_group_stride};
  for (int64_t k = 0; k < plan.depth; ++k) {
    rows[k] = left.row(first + k);
  }
  gather_columns<Operand>(a, plan.stride, rows, plan.depth, t.first_row, t.rows);
  const bool last = first + plan.depth == o.depth;
  if (last) {
    multiply_stage<Operand>(o, plan, t, a, targets, static_cast<T*>(o.out), first > 0);
  } else {
    multiply_stage<Operand>(o, plan, t, a, targets, o.sums, first > 0);
  }
}

// -- the kernel table's entries -------------------------------------------------------------------

static GemmPlan outer_plan(const OuterProduct& o, int64_t first, int64_t threads) {
  return for_float_type(o.dtype, [&]<class T>(T) { return plan_outer<T>(o, first, threads); });
}

static void outer_pack(const OuterProduct& o, int64_t first, const GemmPlan& plan, int64_t task,
                       void* scratch) {
  for_float_type(o.dtype, [&]<class T>(T) { pack_outer<T>(o, first, plan, task, scratch); });
}

static void outer_run(const OuterProduct& o, int64_t first, const GemmPlan& plan, int64_t task,
                      void* scratch) {
  for_float_type(o.dtype, [&]<class T>(T) { run_outer<T>(o, first, plan, task, scratch); });
}

}  // namespace
}  // namespace patchgen_fast
