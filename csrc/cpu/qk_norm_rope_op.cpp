// qk_norm_rope on the CPU: the torch boundary of its forward and backward.
#include <string>

#include "../counters.h"
#include "gemm_run.h"
#include "kernels.h"
#include "qk_norm_rope.h"

namespace patchgen_fast {
namespace {

QkNorm norm_named(const std::string& name) {
  if (name == "none") {
    return QkNorm::none;
  }
  if (name == "rms") {
    return QkNorm::rms;
  }
  if (name == "layer") {
    return QkNorm::layer;
  }
  throw std::invalid_argument("qk_norm_rope: expected norm none, rms or layer; got " + name);
}

// The stride along `dim`, 0 where the tensor is broadcast along it.
int64_t broadcast_stride(const Tensor& tensor, int64_t dim) {
  return tensor.size(dim) == 1 ? 0 : tensor.stride(dim);
}

// The arguments that forward and backward share. Holds what the pointers point to.
struct Arguments {
  Arguments(const Tensor& query, const Tensor& key, const OptionalTensor (&parameters)[4],
            const OptionalTensor& cos_table, const OptionalTensor& sin_table,
            const std::string& norm, double eps, bool interleaved, int64_t prefix) {
    q.batch = query.size(0);
    q.tokens = query.size(2);
    q.width = query.size(3);
    q.dtype = dtype_of(query);
    q.norm = norm_named(norm);
    q.eps = static_cast<float>(eps);
    q.interleaved = interleaved;
    q.prefix = prefix;
    for (int i = 0; i < 4; ++i) {
      floats[i] = as_floats(parameters[i]);
    }
    describe(q.tensors[0], query, floats[0], floats[2]);
    describe(q.tensors[1], key, floats[1], floats[3]);
    if (cos_table.has_value() && sin_table.has_value()) {
      cos = as_floats(cos_table);
      sin = as_floats(sin_table);
      describe_angles();
    }
  }

  QkNormRope q{};
  OptionalTensor floats[4];  // weights of query and key, biases of query and key
  OptionalTensor cos, sin;

 private:
  static void describe(RotatedTensor& t, const Tensor& x, const OptionalTensor& weight,
                       const OptionalTensor& bias) {
    t.heads = x.size(1);
    t.x = x.const_data_ptr();
    t.stride_b = x.stride(0);
    t.stride_h = x.stride(1);
    t.stride_n = x.stride(2);
    t.weight = data_or_null<float>(weight);
    t.bias = data_or_null<float>(bias);
  }

  void describe_angles() {
    q.cos = data_or_null<float>(cos);
    q.cos_stride_b = broadcast_stride(*cos, 0);
    q.cos_stride_h = broadcast_stride(*cos, 1);
    q.cos_stride_n = broadcast_stride(*cos, 2);
    q.sin = data_or_null<float>(sin);
    q.sin_stride_b = broadcast_stride(*sin, 0);
    q.sin_stride_h = broadcast_stride(*sin, 1);
    q.sin_stride_n = broadcast_stride(*sin, 2);
  }
};

std::tuple<Tensor, Tensor> qk_norm_rope(Tensor query, Tensor key, OptionalTensor q_weight,
                                        OptionalTensor k_weight, OptionalTensor q_bias,
                                        OptionalTensor k_bias, OptionalTensor cos,
                                        OptionalTensor sin, std::string norm, double eps,
                                        bool interleaved, int64_t num_prefix_tokens) {
  static CallCounter calls("qk_norm_rope.cpu");
  calls.add();
  Arguments a(query, key, {q_weight, k_weight, q_bias, k_bias}, cos, sin, norm, eps, interleaved,
              num_prefix_tokens);
  Tensor out_query = new_rows_like(query);
  Tensor out_key = new_rows_like(key);
  a.q.tensors[0].out = out_query.mutable_data_ptr();
  a.q.tensors[1].out = out_key.mutable_data_ptr();
  const KernelTable& table = kernels();
  a.q.cut_tasks(false);
  for_each_task(torch_parallel(), a.q.tasks(), 0,
                [&](int64_t task, void*) { table.qk_norm_rope_forward(a.q, task); });
  return {out_query, out_key};
}

// -- backward -------------------------------------------------------------------------------------

void set_gradient(RotatedTensor& t, const Tensor& grad, const Tensor& result) {
  t.grad = grad.const_data_ptr();
  t.grad_stride_b = grad.stride(0);
  t.grad_stride_h = grad.stride(1);
  t.grad_stride_n = grad.stride(2);
  t.out = result.mutable_data_ptr();
}

Tensor new_zeros_like(const Tensor& table) {
  Tensor zeros =
      new_tensor({table.size(0), table.size(1), table.size(2), table.size(3)}, ScalarType::Float);
  return torch::stable::zero_(zeros);
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

EightTensors qk_norm_rope_backward(Tensor grad_query, Tensor grad_key, Tensor query, Tensor key,
                                   OptionalTensor q_weight, OptionalTensor k_weight,
                                   OptionalTensor q_bias, OptionalTensor k_bias, OptionalTensor cos,
                                   OptionalTensor sin, std::string norm, double eps,
                                   bool interleaved, int64_t num_prefix_tokens, bool cos_sin_grad) {
  static CallCounter calls("qk_norm_rope_backward.cpu");
  calls.add();
  const OptionalTensor parameters[4] = {q_weight, k_weight, q_bias, k_bias};
  Arguments a(query, key, parameters, cos, sin, norm, eps, interleaved, num_prefix_tokens);
  const Tensor q_grad = last_stride_one(grad_query);
  const Tensor k_grad = last_stride_one(grad_key);
  Tensor out_query = new_rows_like(query);
  Tensor out_key = new_rows_like(key);
  set_gradient(a.q.tensors[0], q_grad, out_query);
  set_gradient(a.q.tensors[1], k_grad, out_key);

  Tensor grad_cos = nothing(query);
  Tensor grad_sin = nothing(query);
  const bool angle_grads = cos_sin_grad && a.cos.has_value();
  if (angle_grads) {
    grad_cos = new_zeros_like(*a.cos);
    grad_sin = new_zeros_like(*a.sin);
    a.q.grad_cos = static_cast<float*>(grad_cos.mutable_data_ptr());
    a.q.grad_sin = static_cast<float*>(grad_sin.mutable_data_ptr());
    a.q.grad_stride_b = broadcast_stride(grad_cos, 0);
    a.q.grad_stride_h = broadcast_stride(grad_cos, 1);
  }
  a.q.cut_tasks(angle_grads);
  const int64_t tasks = a.q.tasks();
  const Tensor partial = new_tensor({tasks, 4, a.q.width}, ScalarType::Float);
  Tensor sums = new_tensor({4, a.q.width}, ScalarType::Float);
  a.q.partial = static_cast<float*>(partial.mutable_data_ptr());
  const KernelTable& table = kernels();
  for_each_task(
      torch_parallel(), tasks, table.qk_norm_rope_scratch(a.q.width),
      [&](int64_t task, void* scratch) { table.qk_norm_rope_backward(a.q, task, scratch); });
  run_column_sums({tasks, 4 * a.q.width, 4 * a.q.width, Dtype::float32, a.q.partial,
                   static_cast<float*>(sums.mutable_data_ptr())});
  const auto parameter_grad = [&](int i) {
    if (!parameters[i].has_value()) {
      return nothing(query);
    }
    const Tensor sum = torch::stable::select(sums, 0, i);
    // a copy: results of an op must not share memory
    return torch::stable::clone(torch::stable::to(sum, parameters[i]->scalar_type()));
  };
  if (angle_grads) {
    grad_cos = torch::stable::to(grad_cos, cos->scalar_type());
    grad_sin = torch::stable::to(grad_sin, sin->scalar_type());
  }
  return {out_query,         out_key,           parameter_grad(0), parameter_grad(1),
          parameter_grad(2), parameter_grad(3), grad_cos,          grad_sin};
}

}  // namespace
}  // namespace patchgen_fast

STABLE_TORCH_LIBRARY_IMPL(patchgen_fast, CPU, m) {
  m.impl("qk_norm_rope.cpu", TORCH_BOX(&patchgen_fast::qk_norm_rope));
  m.impl("qk_norm_rope_backward.cpu", TORCH_BOX(&patchgen_fast::qk_norm_rope_backward));
}
