// linear on the CPU: the torch boundary of its forward and backward.
#include <string>

#include "../counters.h"
#include "gemm_run.h"

namespace patchgen_fast {
namespace {

Activation activation_named(const std::string& name) {
  if (name == "none") {
    return Activation::none;
  }
  if (name == "relu") {
    return Activation::relu;
  }
  if (name == "gelu") {
    return Activation::gelu;
  }
  if (name == "gelu_tanh") {
    return Activation::gelu_tanh;
  }
  if (name == "silu") {
    return Activation::silu;
  }
  throw std::invalid_argument(
      "linear: expected activation none, relu, gelu, gelu_tanh or silu; got " + name);
}

int64_t row_count(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    rows *= tensor.size(dim);
  }
  return rows;
}

// A matrix [..., columns] as the kernels read it: rows of contiguous elements, `stride` apart.
struct Matrix {
  Tensor data;
  int64_t stride;
};

// Without a copy where the rows lie evenly.
Matrix matrix_of(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  int64_t rows = 1;
  int64_t stride = tensor.size(last);
  bool even = tensor.stride(last) == 1 || tensor.size(last) == 1;
  for (int64_t dim = last - 1; dim >= 0; --dim) {
    if (tensor.size(dim) == 1) {
      continue;
    }
    stride = rows == 1 ? tensor.stride(dim) : stride;
    even = even && tensor.stride(dim) == stride * rows;
    rows *= tensor.size(dim);
  }
  return even ? Matrix{tensor, stride}
              : Matrix{torch::stable::contiguous(tensor), tensor.size(last)};
}

std::tuple<Tensor, Tensor> linear(Tensor input, Tensor weight, OptionalTensor bias,
                                  std::string activation, OptionalTensor residual,
                                  bool save_preactivation) {
  static CallCounter calls("linear.cpu");
  calls.add();
  if (residual.has_value()) {
    residual = as_contiguous(*residual);
  }
  LinearForward f{};
  f.rows = row_count(input);
  f.columns = weight.size(0);
  f.depth = weight.size(1);
  f.dtype = dtype_of(input);
  f.activation = activation_named(activation);
  // The view of a contiguous [depth, columns] is read as that.
  f.depth_major = weight.stride(1) != 1 && weight.stride(0) == 1 && f.depth > 1;
  const Matrix rows = matrix_of(input);
  const Matrix weights = matrix_of(f.depth_major ? torch::stable::transpose(weight, 0, 1) : weight);
  f.input = rows.data.const_data_ptr();
  f.input_stride = rows.stride;
  f.weight = weights.data.const_data_ptr();
  f.weight_stride = weights.stride;
  f.bias = data_or_null(bias);
  f.residual = data_or_null(residual);
  Tensor out = new_rows(input, f.columns);
  Tensor preactivation = save_preactivation ? new_rows(input, f.columns) : nothing(input);
  f.out = out.mutable_data_ptr();
  f.preactivation = save_preactivation ? preactivation.mutable_data_ptr() : nullptr;
  run_linear(f);
  return {out, preactivation};
}

// -- backward -------------------------------------------------------------------------------------

// The gradient of what the activation was given, contiguous.
Tensor grad_of_preactivation(const Tensor& grad_out, const Tensor& preactivation,
                             Activation activation) {
  if (activation == Activation::none) {
    return as_contiguous(grad_out);
  }
  const Tensor grad = as_contiguous(grad_out);
  Tensor grad_pre = new_like(grad);
  run_activation_backward({grad.numel(), dtype_of(grad), activation, grad.const_data_ptr(),
                           preactivation.const_data_ptr(), grad_pre.mutable_data_ptr()});
  return grad_pre;
}

Tensor grad_of_input(const Tensor& grad, const Tensor& input, const Tensor& weight) {
  Tensor grad_input = new_rows(input, weight.size(1));
  LinearForward f{};
  f.rows = row_count(grad);
  f.columns = weight.size(1);
  f.depth = weight.size(0);
  f.dtype = dtype_of(grad);
  f.depth_major = true;
  f.input = grad.const_data_ptr();
  f.input_stride = f.depth;
  f.weight = weight.const_data_ptr();
  f.weight_stride = f.columns;
  f.out = grad_input.mutable_data_ptr();
  run_linear(f);
  return grad_input;
}

Tensor grad_of_weight(const Tensor& grad, const Tensor& input, const Tensor& weight) {
  const Tensor contiguous_input = as_contiguous(input);
  Tensor grad_weight = new_tensor({weight.size(0), weight.size(1)}, weight.scalar_type());
  OuterProduct o{};
  o.rows = weight.size(0);
  o.columns = weight.size(1);
  o.depth = row_count(grad);
  o.dtype = dtype_of(grad);
  o.left = grad.const_data_ptr();
  o.left_group = o.depth;
  o.right = contiguous_input.const_data_ptr();
  o.out = grad_weight.mutable_data_ptr();
  run_outer(o);
  return grad_weight;
}

Tensor grad_of_bias(const Tensor& grad, const Tensor& weight) {
  const int64_t columns = weight.size(0);
  Tensor sums = new_tensor({columns}, ScalarType::Float);
  run_column_sums({row_count(grad), columns, columns, dtype_of(grad), grad.const_data_ptr(),
                   static_cast<float*>(sums.mutable_data_ptr())});
  return torch::stable::to(sums, weight.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor grad_out, Tensor input, Tensor weight,
                                                   Tensor preactivation, std::string activation,
                                                   bool input_grad, bool weight_grad,
                                                   bool bias_grad) {
  static CallCounter calls("linear_backward.cpu");
  calls.add();
  weight = as_contiguous(weight);
  const Tensor grad = grad_of_preactivation(grad_out, preactivation, activation_named(activation));
  return {input_grad ? grad_of_input(grad, input, weight) : nothing(input),
          weight_grad ? grad_of_weight(grad, input, weight) : nothing(weight),
          bias_grad ? grad_of_bias(grad, weight) : nothing(weight)};
}

}  // namespace
}  // namespace patchgen_fast

STABLE_TORCH_LIBRARY_IMPL(patchgen_fast, CPU, m) {
  m.impl("linear.cpu", TORCH_BOX(&patchgen_fast::linear));
  m.impl("linear_backward.cpu", TORCH_BOX(&patchgen_fast::linear_backward));
}
