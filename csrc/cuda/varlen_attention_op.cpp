// varlen_attention and its backward on CUDA: the torch boundary of attention.h for packed
// sequences. The contract stands in patchgen_fast/ops/varlen_attention.py.
#include "../counters.h"
#include "attention.h"
#include "boundary.h"

namespace patchgen_fast::cuda {
namespace {

// Callers may say more than there is.
int longest(int64_t said, const Tensor& packed) {
  return static_cast<int>(std::clamp<int64_t>(said, 0, packed.size(0)));
}

// [tokens, heads, width]
Strides strides_of(const Tensor& tensor) {
  return {0, tensor.stride(1), tensor.stride(0)};
}

AttentionInputs inputs_of(const Tensor& query, const Tensor& key, const Tensor& value,
                          const Tensor& cu_q, const Tensor& cu_k, int64_t max_q, int64_t max_k,
                          bool is_causal, double scale) {
  AttentionInputs p{};
  p.query = query.const_data_ptr();
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.query_stride = strides_of(query);
  p.key_stride = strides_of(key);
  p.value_stride = strides_of(value);
  p.packed = {static_cast<const int32_t*>(cu_q.const_data_ptr()),
              static_cast<const int32_t*>(cu_k.const_data_ptr()), static_cast<int>(query.size(0)),
              static_cast<int>(key.size(0))};
  p.batch = static_cast<int>(cu_q.size(0));
  p.heads = static_cast<int>(query.size(1));
  p.kv_heads = static_cast<int>(key.size(1));
  // Rows that no sequence owns need a block even where all sequences are empty.
  p.queries = std::max(1, longest(max_q, query));
  p.keys = longest(max_k, key);
  p.head_dim = static_cast<int>(query.size(2));
  p.dtype = dtype_of(query);
  p.causal = is_causal;
  p.scale = static_cast<float>(scale);
  return p;
}

Tensor new_like(const Tensor& tensor) {
  return new_tensor(tensor, {tensor.size(0), tensor.size(1), tensor.size(2)}, tensor.scalar_type());
}

std::tuple<Tensor, Tensor> varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_q,
                                            Tensor cu_k, int64_t max_q, int64_t max_k,
                                            bool is_causal, double scale) {
  static CallCounter calls("varlen_attention.cuda");
  calls.add();
  query = in_chunks(query);
  key = in_chunks(key);
  value = in_chunks(value);
  AttentionForward p{};
  static_cast<AttentionInputs&>(p) =
      inputs_of(query, key, value, cu_q, cu_k, max_q, max_k, is_causal, scale);
  Tensor out = new_like(query);
  Tensor lse = new_tensor(query, {query.size(1), query.size(0)}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.out_stride = strides_of(out);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  const int device = query.get_device_index();
  launch_attention_forward(p, device, current_stream(device));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(Tensor grad_out,
                                                             OptionalTensor grad_lse, Tensor query,
                                                             Tensor key, Tensor value, Tensor out,
                                                             Tensor lse, Tensor cu_q, Tensor cu_k,
                                                             int64_t max_q, int64_t max_k,
                                                             bool is_causal, double scale) {
  static CallCounter calls("varlen_attention_backward.cuda");
  calls.add();
  query = in_chunks(query);
  key = in_chunks(key);
  value = in_chunks(value);
  out = in_chunks(out);
  grad_out = in_chunks(grad_out);
  lse = torch::stable::contiguous(lse);
  if (grad_lse.has_value()) grad_lse = torch::stable::contiguous(*grad_lse);
  AttentionBackward p{};
  static_cast<AttentionInputs&>(p) =
      inputs_of(query, key, value, cu_q, cu_k, max_q, max_k, is_causal, scale);
  p.out = out.const_data_ptr();
  p.lse = static_cast<const float*>(lse.const_data_ptr());
  p.grad_out = grad_out.const_data_ptr();
  p.grad_lse = data_or_null<float>(grad_lse);
  p.out_stride = strides_of(out);
  p.grad_out_stride = strides_of(grad_out);
  Tensor grad_query = new_like(query), grad_key = new_like(key), grad_value = new_like(value);
  p.grad_query = grad_query.mutable_data_ptr();
  p.grad_key = grad_key.mutable_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  p.grad_query_stride = strides_of(grad_query);
  p.grad_key_stride = strides_of(grad_key);
  p.grad_value_stride = strides_of(grad_value);
  const int device = query.get_device_index();
  launch_attention_backward(p, device, current_stream(device));
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace patchgen_fast::cuda

// The raw ops are defined beside the CPU kernels.
STABLE_TORCH_LIBRARY_IMPL(patchgen_fast_native, CUDA, m) {
  m.impl("varlen_attention", TORCH_BOX(&patchgen_fast::cuda::varlen_attention));
  m.impl("varlen_attention_backward", TORCH_BOX(&patchgen_fast::cuda::varlen_attention_backward));
}
