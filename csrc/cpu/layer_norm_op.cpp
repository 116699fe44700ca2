// add_layer_norm on the CPU: the torch boundary of its forward and backward.
#include "../counters.h"
#include "gemm_run.h"
#include "kernels.h"
#include "layer_norm.h"

namespace patchgen_fast {
namespace {

int64_t norm_tasks(int64_t rows) {
  return (rows + kNormRows - 1) / kNormRows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(Tensor input, Tensor residual,
                                                          OptionalTensor weight,
                                                          OptionalTensor bias, double eps) {
  static CallCounter calls("add_layer_norm.cpu");
  calls.add();
  input = as_contiguous(input);
  residual = as_contiguous(residual);
  AddLayerNorm n{};
  n.width = input.size(input.dim() - 1);
  n.rows = n.width > 0 ? input.numel() / n.width : 0;
  n.dtype = dtype_of(input);
  const OptionalTensor float_weight = as_floats(weight);
  const OptionalTensor float_bias = as_floats(bias);
  Tensor normalised = torch::stable::empty_like(input);
  Tensor sum = torch::stable::empty_like(input);
  prefer_huge_pages(normalised);
  prefer_huge_pages(sum);
  Tensor mean = new_tensor({n.rows}, ScalarType::Float);
  Tensor rstd = new_tensor({n.rows}, ScalarType::Float);
  n.input = input.const_data_ptr();
  n.residual = residual.const_data_ptr();
  n.weight = data_or_null<float>(float_weight);
  n.bias = data_or_null<float>(float_bias);
  n.eps = static_cast<float>(eps);
  n.normalised = normalised.mutable_data_ptr();
  n.sum = sum.mutable_data_ptr();
  n.mean = static_cast<float*>(mean.mutable_data_ptr());
  n.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  const KernelTable& table = kernels();
  for_each_task(torch_parallel(), norm_tasks(n.rows), 0,
                [&](int64_t task, void*) { table.add_layer_norm_forward(n, task); });
  return {normalised, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(Tensor grad_normalised,
                                                           OptionalTensor grad_sum, Tensor sum,
                                                           OptionalTensor weight, Tensor mean,
                                                           Tensor rstd) {
  static CallCounter calls("add_layer_norm_backward.cpu");
  calls.add();
  grad_normalised = as_contiguous(grad_normalised);
  if (grad_sum.has_value()) {
    grad_sum = as_contiguous(*grad_sum);
  }
  sum = as_contiguous(sum);
  AddLayerNormBackward n{};
  n.width = sum.size(sum.dim() - 1);
  n.rows = n.width > 0 ? sum.numel() / n.width : 0;
  n.dtype = dtype_of(sum);
  const OptionalTensor float_weight = as_floats(weight);
  const int64_t tasks = norm_tasks(n.rows);
  Tensor grad_total = torch::stable::empty_like(sum);
  prefer_huge_pages(grad_total);
  const Tensor partial = new_tensor({tasks, 2, n.width}, ScalarType::Float);
  Tensor sums = new_tensor({2, n.width}, ScalarType::Float);
  n.grad_normalised = grad_normalised.const_data_ptr();
  n.grad_sum = data_or_null(grad_sum);
  n.sum = sum.const_data_ptr();
  n.weight = data_or_null<float>(float_weight);
  n.mean = static_cast<const float*>(mean.const_data_ptr());
  n.rstd = static_cast<const float*>(rstd.const_data_ptr());
  n.grad_total = grad_total.mutable_data_ptr();
  n.partial = static_cast<float*>(partial.mutable_data_ptr());
  const KernelTable& table = kernels();
  for_each_task(
      torch_parallel(), tasks, table.add_layer_norm_scratch(n.width),
      [&](int64_t task, void* scratch) { table.add_layer_norm_backward(n, task, scratch); });
  run_column_sums({tasks, 2 * n.width, 2 * n.width, Dtype::float32, n.partial,
                   static_cast<float*>(sums.mutable_data_ptr())});
  const ScalarType type = weight.has_value() ? weight->scalar_type() : sum.scalar_type();
  sums = torch::stable::to(sums, type);
  // copies: results of an op must not share memory
  return {grad_total, torch::stable::clone(torch::stable::select(sums, 0, 0)),
          torch::stable::clone(torch::stable::select(sums, 0, 1))};
}

}  // namespace
}  // namespace patchgen_fast

STABLE_TORCH_LIBRARY_IMPL(patchgen_fast, CPU, m) {
  m.impl("add_layer_norm.cpu", TORCH_BOX(&patchgen_fast::add_layer_norm));
  m.impl("add_layer_norm_backward.cpu", TORCH_BOX(&patchgen_fast::add_layer_norm_backward));
}
