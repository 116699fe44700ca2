// A linear layer: product, bias, activation and residual in one pass over the output.
//
//     out = activation(input @ W^T + bias) + residual
//
// One task owns a block of rows (48 to 96) and all or some columns; it gathers the rows only where
// they can't be multiplied as they lie. Without an activation the epilogue runs in registers; with
// one, the tile goes through a buffer of 1.5 KiB in L1, so that the exponentials are compiled once
// and not into every shape of tile. Bytes moved: input, residual and output once, the weight twice
// (packing).
#pragma once

#include "gemm_gather.h"
#include "gemm_kernel.h"
#include "linear_sink.h"
#include "linear_transposed_kernel.h"

namespace patchgen_fast {
namespace {

template <class T>
static void pack_linear(const LinearForward& f, const GemmPlan& plan, int64_t panel) {
  using Operand = typename OperandFor<T>::type;
  const int64_t column = panel_column(plan, panel);
  const T* weight = static_cast<const T*>(f.weight);
  Word* packed = static_cast<Word*>(f.packed);
  Word* to = packed + panel_offset(plan, panel);
  if (f.depth_major) {
    pack_columns<Operand>(to, plan, column, 0, weight, f.weight_stride, plan.depth);
  } else {
    pack_rows<Operand>(to, plan, column, weight + column * f.weight_stride, f.weight_stride);
  }
  pack_bias(reinterpret_cast<float*>(packed + bias_offset(plan)) + column, plan, column,
            static_cast<const T*>(f.bias));
}

template <class T>
static void multiply_linear(const LinearForward& f, GemmPlan plan, int64_t task, void* scratch) {
  using Operand = typename OperandFor<T>::type;
  const GemmTask t = gemm_task(plan, task);
  Word* gathered = static_cast<Word*>(scratch);
  auto* targets = reinterpret_cast<RowTarget<T>*>(gathered + plan.rows_per_task * plan.stride);
  const RowsOf<T> input{static_cast<const T*>(f.input), f.input_stride, plan.rows, 0};
  const Word* a =
      gather_unless_in_place(gathered, plan.stride, input, t.first_row, t.rows, f.depth);
  const Word* packed = static_cast<const Word*>(f.packed);
  const float* bias = reinterpret_cast<const float*>(packed + bias_offset(plan));
  const int64_t offset = t.first_row * f.columns;
  T* out = static_cast<T*>(f.out) + offset;
  const T* residual = f.residual == nullptr ? nullptr : static_cast<const T*>(f.residual) + offset;
  if (f.activation == Activation::none && f.preactivation == nullptr) {
    for (int64_t r = 0; r < t.rows; ++r) {
      targets[r] = {out + r * f.columns, residual == nullptr ? nullptr : residual + r * f.columns};
    }
    const RowSink<T> sink{targets, bias, f.columns, residual != nullptr};
    multiply_block<Operand>(plan, t, a, packed, a == gathered, sink);
  } else {
    T* pre = f.preactivation == nullptr ? nullptr : static_cast<T*>(f.preactivation) + offset;
    const LinearSink<T> sink{out, pre, residual, bias, f.columns, f.activation};
    multiply_block<Operand>(plan, t, a, packed, a == gathered, sink);
  }
}

template <class T, Activation Kind>
static void differentiate(const ActivationBackward& b, int64_t first, int64_t count) {
  const T* grad = static_cast<const T*>(b.grad_out) + first;
  const T* pre = static_cast<const T*>(b.preactivation) + first;
  T* to = static_cast<T*>(b.grad_pre) + first;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec slope = derivative<Kind>(load_up_to(pre + i, count - i));
    store_up_to(to + i, load_up_to(grad + i, count - i) * slope, count - i);
  }
}

// -- the kernel table's entries -------------------------------------------------------------------

static GemmPlan linear_plan(const LinearForward& f, int64_t threads) {
  return for_float_type(f.dtype, [&]<class T>(T) {
    if (suits_transposed<T>(f)) {
      return plan_transposed<T>(f, threads);
    }
    return plan_gemm<typename OperandFor<T>::type>(f.rows, f.columns, f.depth, threads,
                                                   sizeof(RowTarget<T>));
  });
}

static void linear_pack(const LinearForward& f, const GemmPlan& plan, int64_t task) {
  for_float_type(f.dtype, [&]<class T>(T) {
    plan.transposed ? pack_input<T>(f, plan, task) : pack_linear<T>(f, plan, task);
  });
}

static void linear_forward(const LinearForward& f, const GemmPlan& plan, int64_t task,
                           void* scratch) {
  for_float_type(f.dtype, [&]<class T>(T) {
    plan.transposed ? multiply_transposed<T>(f, plan, task, scratch)
                    : multiply_linear<T>(f, plan, task, scratch);
  });
}

// Elements [task * kActivationChunk, ...).
static void activation_backward(const ActivationBackward& b, int64_t task) {
  const int64_t first = task * kActivationChunk;
  const int64_t count = smaller(b.elements - first, kActivationChunk);
  for_float_type(b.dtype, [&]<class T>(T) {
    for_activation(b.activation, [&](auto kind) { differentiate<T, kind.value>(b, first, count); });
  });
}

}  // namespace
}  // namespace patchgen_fast
