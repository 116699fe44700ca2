// torch's face of attention on the CPU: reads tensors into the kernels' arguments, allocates, and
// spreads the tasks. The contract stands in patchgen_fast/ops/attention.py.
#include <tuple>

#include "../counters.h"
#include "attention.h"
#include "attention_decode.h"
#include "boundary.h"
#include "kernels.h"

namespace patchgen_fast {
namespace {

AttentionTensor operand(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

int64_t mask_stride(const Tensor& mask, int64_t dim) {
  return mask.size(dim) == 1 ? 0 : mask.stride(dim);
}

AttentionMask mask_of(const OptionalTensor& mask) {
  if (!mask.has_value()) {
    return {};
  }
  return {mask->const_data_ptr(), dtype_of(*mask),       mask_stride(*mask, 0),
          mask_stride(*mask, 1),  mask_stride(*mask, 2), mask_stride(*mask, 3)};
}

void read_inputs(AttentionInputs& inputs, const Tensor& query, const Tensor& key,
                 const Tensor& value, const OptionalTensor& attn_mask,
                 const OptionalTensor& kv_lengths, const OptionalTensor& query_offset,
                 bool is_causal, double scale) {
  inputs.dtype = dtype_of(query);
  inputs.batch = query.size(0);
  inputs.heads = query.size(1);
  inputs.kv_heads = key.size(1);
  inputs.queries = query.size(2);
  inputs.keys = key.size(2);
  inputs.dim = query.size(3);
  inputs.query = operand(query);
  inputs.key = operand(key);
  inputs.value = operand(value);
  inputs.mask = mask_of(attn_mask);
  inputs.kv_lengths = data_or_null<int32_t>(kv_lengths);
  inputs.query_offset = data_or_null<int32_t>(query_offset);
  inputs.is_causal = is_causal;
  inputs.scale = static_cast<float>(scale);
  inputs.lse_head = inputs.queries;
}

// Few queries: their keys and values are streamed.
void decode(AttentionDecode& problem) {
  Parallel threads = torch_parallel();
  threads.threads = AttentionDecode::useful_threads(problem, threads.threads);
  const AttentionPlan plan = kernels().attention_decode_plan(problem, threads.threads);
  std::optional<Tensor> partial;
  if (plan.workspace > 0) {
    partial = new_tensor({plan.workspace}, ScalarType::Float);
    problem.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  for_each_task(threads, plan.tasks, plan.scratch_bytes, [&](int64_t task, void* scratch) {
    kernels().attention_decode(problem, plan, task, scratch);
  });
  if (plan.chunks > 1) {
    for_each_task(threads, plan.tasks / plan.chunks, 0, [&](int64_t task, void*) {
      kernels().attention_decode_join(problem, plan, task);
    });
  }
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value,
                                     OptionalTensor attn_mask, OptionalTensor kv_lengths,
                                     OptionalTensor query_offset, bool is_causal, double scale) {
  static CallCounter calls("attention.cpu");
  calls.add();
  AttentionDecode problem{};
  read_inputs(problem, query, key, value, attn_mask, kv_lengths, query_offset, is_causal, scale);
  Tensor out = new_rows_like(query);
  Tensor lse = new_tensor({problem.batch, problem.heads, problem.queries}, ScalarType::Float);
  problem.out = out.mutable_data_ptr();
  problem.lse = static_cast<float*>(lse.mutable_data_ptr());

  if (AttentionDecode::takes(problem)) {
    decode(problem);
  } else {
    const Parallel threads = torch_parallel();
    const AttentionPlan plan = kernels().attention_plan(problem, threads.threads);
    for_each_task(threads, plan.tasks, plan.scratch_bytes, [&](int64_t task, void* scratch) {
      kernels().attention_forward(problem, plan, task, scratch);
    });
  }
  return {out, lse};
}

// Kernels read rows: a gradient that is a broadcast of few numbers becomes a plain tensor first.
Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Tensor new_mask_gradient(AttentionBackward& problem, const OptionalTensor& mask, bool wanted,
                         ScalarType otherwise) {
  if (!wanted) {
    return new_tensor({0}, otherwise);
  }
  Tensor grad =
      new_tensor({mask->size(0), mask->size(1), mask->size(2), mask->size(3)}, mask->scalar_type());
  problem.mask_batch = mask->size(0);
  problem.mask_heads = mask->size(1);
  problem.mask_queries = mask->size(2);
  problem.mask_keys = mask->size(3);
  problem.grad_mask = grad.mutable_data_ptr();
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out,
    Tensor lse, OptionalTensor attn_mask, OptionalTensor kv_lengths, OptionalTensor query_offset,
    bool is_causal, double scale, bool mask_grad) {
  static CallCounter calls("attention_backward.cpu");
  calls.add();
  AttentionBackward problem{};
  read_inputs(problem, query, key, value, attn_mask, kv_lengths, query_offset, is_causal, scale);
  const Tensor dense_grad = with_dense_rows(grad_out), dense_out = with_dense_rows(out);
  const Tensor dense_lse = torch::stable::contiguous(lse);
  if (grad_lse.has_value()) {
    grad_lse = torch::stable::contiguous(*grad_lse);
  }
  problem.grad_out = operand(dense_grad);
  problem.out = operand(dense_out);
  problem.lse = static_cast<const float*>(dense_lse.const_data_ptr());
  problem.grad_lse = data_or_null<float>(grad_lse);

  Tensor grad_query = new_rows_like(query), grad_key = new_rows_like(key),
         grad_value = new_rows_like(value);
  problem.grad_query = grad_query.mutable_data_ptr();
  problem.grad_key = grad_key.mutable_data_ptr();
  problem.grad_value = grad_value.mutable_data_ptr();
  Tensor grad_mask = new_mask_gradient(problem, attn_mask, mask_grad, query.scalar_type());

  const Parallel threads = torch_parallel();
  const AttentionPlan plan = kernels().attention_backward_plan(problem);
  const Tensor statistics = new_tensor({plan.workspace}, ScalarType::Float);
  problem.statistics =
      plan.workspace == 0 ? nullptr : static_cast<float*>(statistics.mutable_data_ptr());
  for_each_task(threads, plan.tasks, plan.scratch_bytes, [&](int64_t task, void* scratch) {
    kernels().attention_backward(problem, task, scratch);
  });
  if (mask_grad) {
    const AttentionPlan mask_plan = kernels().attention_mask_gradient_plan(problem);
    if (mask_plan.tasks == 0) {
      torch::stable::zero_(grad_mask);
    }
    for_each_task(threads, mask_plan.tasks, mask_plan.scratch_bytes,
                  [&](int64_t task, void* scratch) {
                    kernels().attention_mask_gradient(problem, task, scratch);
                  });
  }
  return {grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace
}  // namespace patchgen_fast

STABLE_TORCH_LIBRARY_IMPL(patchgen_fast, CPU, m) {
  m.impl("attention.cpu", TORCH_BOX(&patchgen_fast::attention));
  m.impl("attention_backward.cpu", TORCH_BOX(&patchgen_fast::attention_backward));
}
