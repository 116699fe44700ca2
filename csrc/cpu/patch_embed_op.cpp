// patch_embed on the CPU: the torch boundary of its forward and backward.
#include "../counters.h"
#include "gemm_run.h"

namespace patchgen_fast {
namespace {

PatchSource patch_source(const Tensor& images, const Tensor& weight, const OptionalTensor& mean,
                         const OptionalTensor& std, bool interleave) {
  return {patch_grid(images, weight, interleave), images.const_data_ptr(), dtype_of(images),
          data_or_null<float>(mean), data_or_null<float>(std)};
}

Tensor patch_embed(Tensor images, Tensor weight, OptionalTensor bias, OptionalTensor pos_embed,
                   OptionalTensor prefix, OptionalTensor mean, OptionalTensor std) {
  static CallCounter calls("patch_embed.cpu");
  calls.add();
  PatchEmbedForward f{};
  f.source = patch_source(images, weight, mean, std, true);
  f.dtype = dtype_of(weight);
  f.weight = weight.const_data_ptr();
  f.bias = data_or_null(bias);
  f.pos_embed = data_or_null(pos_embed);
  f.prefix = data_or_null(prefix);
  f.prefix_tokens = prefix.has_value() ? prefix->size(0) : 0;
  f.embed = weight.size(0);
  const PatchGrid& g = f.source.grid;
  Tensor out = new_tensor({g.batch, f.prefix_tokens + g.patches(), f.embed}, weight.scalar_type());
  f.out = out.mutable_data_ptr();
  run_patch_embed(f);
  return out;
}

// -- backward -------------------------------------------------------------------------------------

// The patches' gradients begin behind those of the prefix tokens.
const void* patch_tokens(const Tensor& grad_out, int64_t patches) {
  const int64_t prefix = grad_out.size(1) - patches;
  return static_cast<const char*>(grad_out.const_data_ptr()) +
         static_cast<size_t>(prefix * grad_out.size(2)) * grad_out.element_size();
}

Tensor grad_of_images(const Tensor& grad_out, const Tensor& images, const Tensor& weight,
                      const OptionalTensor& std) {
  Tensor grad = new_like(images);
  PatchUnembed u{};
  u.grid = patch_grid(grad, weight, false);
  const PatchGrid& g = u.grid;
  const int64_t covered = g.batch * g.patches() * g.depth();
  if (covered != grad.numel()) {
    torch::stable::zero_(grad);
  }
  u.images = grad.mutable_data_ptr();
  u.image_dtype = dtype_of(grad);
  u.dtype = dtype_of(weight);
  u.tokens = patch_tokens(grad_out, g.patches());
  u.token_group_stride = grad_out.stride(0);
  u.weight = weight.const_data_ptr();
  u.std = data_or_null<float>(std);
  u.embed = weight.size(0);
  run_patch_unembed(u);
  return grad;
}

Tensor grad_of_weight(const Tensor& grad_out, const Tensor& images, const Tensor& weight,
                      const OptionalTensor& mean, const OptionalTensor& std) {
  Tensor grad = new_like(weight);
  OuterProduct o{};
  o.patches = patch_source(images, weight, mean, std, false);
  const PatchGrid& g = o.patches.grid;
  o.rows = weight.size(0);
  o.columns = g.depth();
  o.depth = g.batch * g.patches();
  o.dtype = dtype_of(weight);
  o.left = patch_tokens(grad_out, g.patches());
  o.left_group = g.patches();
  o.left_group_stride = grad_out.stride(0);
  o.out = grad.mutable_data_ptr();
  run_outer(o);
  return grad;
}

// Over the batch; float32 [P + N, E].
Tensor sum_of_tokens(const Tensor& grad_out) {
  Tensor sums = new_tensor({grad_out.size(1), grad_out.size(2)}, ScalarType::Float);
  const int64_t columns = sums.numel();
  run_column_sums({grad_out.size(0), columns, columns, dtype_of(grad_out),
                   grad_out.const_data_ptr(), static_cast<float*>(sums.mutable_data_ptr())});
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> patch_embed_backward(Tensor grad_out, Tensor images,
                                                        Tensor weight, OptionalTensor mean,
                                                        OptionalTensor std, bool images_grad,
                                                        bool weight_grad) {
  static CallCounter calls("patch_embed_backward.cpu");
  calls.add();
  grad_out = as_contiguous(grad_out);
  return {images_grad ? grad_of_images(grad_out, images, weight, std) : nothing(weight),
          weight_grad ? grad_of_weight(grad_out, images, weight, mean, std) : nothing(weight),
          sum_of_tokens(grad_out)};
}

}  // namespace
}  // namespace patchgen_fast

STABLE_TORCH_LIBRARY_IMPL(patchgen_fast, CPU, m) {
  m.impl("patch_embed.cpu", TORCH_BOX(&patchgen_fast::patch_embed));
  m.impl("patch_embed_backward.cpu", TORCH_BOX(&patchgen_fast::patch_embed_backward));
}
