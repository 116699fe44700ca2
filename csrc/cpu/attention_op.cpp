// torch's face of attention on the CPU: reads tensors into the kernels' arguments, allocates, and
// spreads the tasks. The contract stands in patchgen_fast/ops/attention.py.
#include <tuple>

#include "../counters.h"
#include "attention.h"
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

// Shape [batch, heads, tokens, dim] over memory [batch, tokens, heads, dim].
Tensor empty_rows(int64_t batch, int64_t heads, int64_t tokens, int64_t dim, ScalarType dtype) {
  const Tensor memory = torch::stable::empty({batch, tokens, heads, dim}, dtype);
  return torch::stable::transpose(memory, 1, 2);
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value,
                                     OptionalTensor attn_mask, OptionalTensor kv_lengths,
                                     OptionalTensor query_offset, bool is_causal, double scale) {
  static CallCounter calls("attention.cpu");
  calls.add();
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  const int64_t dim = query.size(3);
  Tensor out = empty_rows(batch, heads, queries, dim, query.scalar_type());
  Tensor lse = torch::stable::empty({batch, heads, queries}, ScalarType::Float);

  AttentionForward problem{};
  problem.dtype = dtype_of(query);
  problem.batch = batch;
  problem.heads = heads;
  problem.kv_heads = key.size(1);
  problem.queries = queries;
  problem.keys = key.size(2);
  problem.dim = dim;
  problem.query = operand(query);
  problem.key = operand(key);
  problem.value = operand(value);
  problem.mask = mask_of(attn_mask);
  problem.kv_lengths = data_or_null<int32_t>(kv_lengths);
  problem.query_offset = data_or_null<int32_t>(query_offset);
  problem.is_causal = is_causal;
  problem.scale = static_cast<float>(scale);
  problem.out = out.mutable_data_ptr();
  problem.lse = static_cast<float*>(lse.mutable_data_ptr());

  const Parallel threads = torch_parallel();
  const AttentionPlan plan = kernels().attention_plan(problem, threads.threads);
  for_each_task(threads, plan.tasks, plan.scratch_bytes, [&](int64_t task, void* scratch) {
    kernels().attention_forward(problem, plan, task, scratch);
  });
  return {out, lse};
}

}  // namespace
}  // namespace patchgen_fast

STABLE_TORCH_LIBRARY_IMPL(patchgen_fast, CPU, m) {
  m.impl("attention.cpu", TORCH_BOX(&patchgen_fast::attention));
}
