// attention and attention_backward on CUDA: the torch boundary of attention.h.
#include "../counters.h"
#include "attention.h"
#include "boundary.h"

namespace patchgen_fast::cuda {
namespace {

Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// [batch, heads, rows, width] in memory [batch, rows, heads, width].
Tensor new_rows(const Tensor& like) {
  return torch::stable::transpose(
      new_tensor(like, {like.size(0), like.size(2), like.size(1), like.size(3)},
                 like.scalar_type()),
      1, 2);
}

Mask mask_of(const OptionalTensor& mask, ScalarType element) {
  if (!mask.has_value()) return {};
  auto stride = [&](int64_t d) { return mask->size(d) == 1 ? 0 : mask->stride(d); };
  const ScalarType type = mask->scalar_type();
  const MaskKind kind = type == ScalarType::Bool ? MaskKind::BOOL
                        : type == element        ? MaskKind::ELEMENT
                                                 : MaskKind::FLOAT32;
  return {mask->const_data_ptr(), kind, stride(0), stride(1), stride(2), stride(3)};
}

AttentionInputs inputs_of(const Tensor& query, const Tensor& key, const Tensor& value,
                          const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
                          const OptionalTensor& query_offset, bool is_causal, double scale) {
  AttentionInputs p{};
  p.query = query.const_data_ptr();
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.query_stride = strides_of(query);
  p.key_stride = strides_of(key);
  p.value_stride = strides_of(value);
  p.mask = mask_of(attn_mask, query.scalar_type());
  p.kv_lengths = data_or_null<int32_t>(kv_lengths);
  p.query_offset = data_or_null<int32_t>(query_offset);
  p.batch = static_cast<int>(query.size(0));
  p.heads = static_cast<int>(query.size(1));
  p.kv_heads = static_cast<int>(key.size(1));
  p.queries = static_cast<int>(query.size(2));
  p.keys = static_cast<int>(key.size(2));
  p.head_dim = static_cast<int>(query.size(3));
  p.dtype = dtype_of(query);
  p.causal = is_causal;
  p.scale = static_cast<float>(scale);
  return p;
}

void launch_forward(const AttentionForward& p, const Tensor& query) {
  const int device = query.get_device_index();
  void* stream = current_stream(device);
  if (p.queries > FEW_QUERIES) return launch_attention_forward(p, device, stream);
  const DecodeSize size = attention_decode_size(p, device);
  if (size.splits == 1) return launch_attention_decode(p, {nullptr, nullptr, 1}, device, stream);
  Tensor partial = new_tensor(query, {size.partial_floats}, ScalarType::Float);
  Tensor tickets = new_tensor(query, {size.tickets}, ScalarType::Int);
  torch::stable::zero_(tickets);
  launch_attention_decode(p,
                          {static_cast<float*>(partial.mutable_data_ptr()),
                           static_cast<unsigned*>(tickets.mutable_data_ptr()), size.splits},
                          device, stream);
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value,
                                     OptionalTensor attn_mask, OptionalTensor kv_lengths,
                                     OptionalTensor query_offset, bool is_causal, double scale) {
  static CallCounter calls("attention.cuda");
  calls.add();
  query = in_chunks(query);
  key = in_chunks(key);
  value = in_chunks(value);
  AttentionForward p{};
  static_cast<AttentionInputs&>(p) =
      inputs_of(query, key, value, attn_mask, kv_lengths, query_offset, is_causal, scale);
  Tensor out = new_rows(query);
  Tensor lse = new_tensor(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.out_stride = strides_of(out);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  launch_forward(p, query);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out,
    Tensor lse, OptionalTensor attn_mask, OptionalTensor kv_lengths, OptionalTensor query_offset,
    bool is_causal, double scale, bool mask_grad) {
  static CallCounter calls("attention_backward.cuda");
  calls.add();
  if (mask_grad)
    throw std::invalid_argument(
        "patchgen_fast: the CUDA kernel gives no gradient of attn_mask\n"
        "Remedy: pass backend=None or backend=\"triton\" where the mask needs one");
  query = in_chunks(query);
  key = in_chunks(key);
  value = in_chunks(value);
  out = in_chunks(out);
  grad_out = in_chunks(grad_out);
  lse = torch::stable::contiguous(lse);
  if (grad_lse.has_value()) grad_lse = torch::stable::contiguous(*grad_lse);
  AttentionBackward p{};
  static_cast<AttentionInputs&>(p) =
      inputs_of(query, key, value, attn_mask, kv_lengths, query_offset, is_causal, scale);
  p.out = out.const_data_ptr();
  p.lse = static_cast<const float*>(lse.const_data_ptr());
  p.grad_out = grad_out.const_data_ptr();
  p.grad_lse = data_or_null<float>(grad_lse);
  p.out_stride = strides_of(out);
  p.grad_out_stride = strides_of(grad_out);
  Tensor grad_query = new_rows(query), grad_key = new_rows(key), grad_value = new_rows(value);
  p.grad_query = grad_query.mutable_data_ptr();
  p.grad_key = grad_key.mutable_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  p.grad_query_stride = strides_of(grad_query);
  p.grad_key_stride = strides_of(grad_key);
  p.grad_value_stride = strides_of(grad_value);
  const int device = query.get_device_index();
  launch_attention_backward(p, device, current_stream(device));
  Tensor grad_mask =
      new_tensor(query, {0}, attn_mask.has_value() ? attn_mask->scalar_type() : ScalarType::Float);
  return {grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace
}  // namespace patchgen_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(patchgen_fast, CUDA, m) {
  m.impl("attention.cuda", TORCH_BOX(&patchgen_fast::cuda::attention));
  m.impl("attention_backward.cuda", TORCH_BOX(&patchgen_fast::cuda::attention_backward));
}
