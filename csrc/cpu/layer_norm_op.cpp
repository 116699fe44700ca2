// layer_norm and add_layer_norm on the CPU: the torch boundary of their forward and backward.
#include "../counters.h"
#include "gemm_run.h"
#include "kernels.h"
#include "layer_norm.h"

namespace patchgen_fast {
namespace {

int64_t norm_tasks(int64_t rows) {
  return (rows + kNormRows - 1) / kNormRows;
}

struct Normalised {
  Tensor out, sum, mean, rstd;  // without a residual, the sum is empty
};

Normalised normalise(Tensor input, OptionalTensor residual, OptionalTensor weight,
                     OptionalTensor bias, double eps) {
  input = as_contiguous(input);
  if (residual.has_value()) {
    residual = as_contiguous(*residual);
  }
  AddLayerNorm n{};
  n.width = input.size(input.dim() - 1);
  n.rows = n.width > 0 ? input.numel() / n.width : 0;
  n.dtype = dtype_of(input);
  const OptionalTensor float_weight = as_floats(weight);
  const OptionalTensor float_bias = as_floats(bias);
  Normalised made{new_like(input), residual.has_value() ? new_like(input) : nothing(input),
                  new_tensor({n.rows}, ScalarType::Float), new_tensor({n.rows}, ScalarType::Float)};
  n.input = input.const_data_ptr();
  n.residual = data_or_null(residual);
  n.weight = data_or_null<float>(float_weight);
  n.bias = data_or_null<float>(float_bias);
  n.eps = static_cast<float>(eps);
  n.normalised = made.out.mutable_data_ptr();
  n.sum = residual.has_value() ? made.sum.mutable_data_ptr() : nullptr;
  n.mean = static_cast<float*>(made.mean.mutable_data_ptr());
  n.rstd = static_cast<float*>(made.rstd.mutable_data_ptr());
  const KernelTable& table = kernels();
  for_each_task(torch_parallel(), norm_tasks(n.rows), 0,
                [&](int64_t task, void*) { table.add_layer_norm_forward(n, task); });
  return made;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(Tensor input, Tensor residual,
                                                          OptionalTensor weight,
                                                          OptionalTensor bias, double eps) {
  static CallCounter calls("add_layer_norm.cpu");
  calls.add();
  Normalised made = normalise(input, residual, weight, bias, eps);
  return {made.out, made.sum, made.mean, made.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor input, OptionalTensor weight,
                                              OptionalTensor bias, double eps) {
  static CallCounter calls("layer_norm.cpu");
  calls.add();
  Normalised made = normalise(input, std::nullopt, weight, bias, eps);
  return {made.out, made.mean, made.rstd};
}

// -- backward -------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> differentiate(Tensor grad_normalised, OptionalTensor grad_sum,
                                                 Tensor sum, const OptionalTensor& weight,
                                                 const Tensor& mean, const Tensor& rstd) {
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
  Tensor grad_total = new_like(sum);
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

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(Tensor grad_normalised,
                                                           OptionalTensor grad_sum, Tensor sum,
                                                           OptionalTensor weight, Tensor mean,
                                                           Tensor rstd) {
  static CallCounter calls("add_layer_norm_backward.cpu");
  calls.add();
  return differentiate(grad_normalised, grad_sum, sum, weight, mean, rstd);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad_out, Tensor input,
                                                       OptionalTensor weight, Tensor mean,
                                                       Tensor rstd) {
  static CallCounter calls("layer_norm_backward.cpu");
  calls.add();
  return differentiate(grad_out, std::nullopt, input, weight, mean, rstd);
}

}  // namespace
}  // namespace patchgen_fast

STABLE_TORCH_LIBRARY_IMPL(patchgen_fast, CPU, m) {
  m.impl("layer_norm.cpu", TORCH_BOX(&patchgen_fast::layer_norm));
  m.impl("layer_norm_backward.cpu", TORCH_BOX(&patchgen_fast::layer_norm_backward));
  m.impl("add_layer_norm.cpu", TORCH_BOX(&patchgen_fast::add_layer_norm));
  m.impl("add_layer_norm_backward.cpu", TORCH_BOX(&patchgen_fast::add_layer_norm_backward));
}
