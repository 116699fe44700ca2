// patch_embed and patch_embed_backward on CUDA: the torch boundary of patch_embed.h.
#include "../counters.h"
#include "boundary.h"
#include "patch_embed.h"

namespace patchgen_fast::cuda {
namespace {

// images [B,C,H,W] or [B,C,T,H,W]; weight [E,C,(Pt,)Ph,Pw].
PatchGeometry geometry_of(const Tensor& images, const Tensor& weight, const OptionalTensor& mean,
                          const OptionalTensor& std) {
  const bool video = images.dim() == 5;
  const int64_t height = images.dim() - 2;
  PatchGeometry g{};
  g.images = images.const_data_ptr();
  g.image_dtype = dtype_of(images);
  g.batch_stride = images.stride(0);
  g.channel_stride = images.stride(1);
  g.time_stride = video ? images.stride(2) : 0;
  g.row_stride = images.stride(height);
  g.column_stride = images.stride(height + 1);
  g.batch = static_cast<int>(images.size(0));
  g.channels = static_cast<int>(images.size(1));
  g.patch_t = video ? static_cast<int>(weight.size(2)) : 1;
  g.patch_h = static_cast<int>(weight.size(height));
  g.patch_w = static_cast<int>(weight.size(height + 1));
  g.grid_t = video ? static_cast<int>(images.size(2)) / g.patch_t : 1;
  g.grid_h = static_cast<int>(images.size(height)) / g.patch_h;
  g.grid_w = static_cast<int>(images.size(height + 1)) / g.patch_w;
  g.mean = data_or_null<float>(mean);
  g.std = data_or_null<float>(std);
  return g;
}

// Copied where it is not contiguous, or where its beginning is not aligned to 16 bytes.
Tensor aligned(const Tensor& tensor) {
  Tensor whole = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0
             ? whole
             : torch::stable::clone(whole);
}

// Kernels read uint8, float32 and the weights' dtype.
Tensor readable(const Tensor& images, const Tensor& weight) {
  const ScalarType type = images.scalar_type();
  const bool other_half =
      (type == ScalarType::Half || type == ScalarType::BFloat16) && type != weight.scalar_type();
  return other_half ? torch::stable::to(images, ScalarType::Float) : images;
}

Tensor patch_embed(Tensor images, Tensor weight, OptionalTensor bias, OptionalTensor pos_embed,
                   OptionalTensor prefix, OptionalTensor mean, OptionalTensor std) {
  static CallCounter calls("patch_embed.cuda");
  calls.add();
  weight = aligned(weight);
  images = readable(images, weight);
  PatchEmbedForward p{};
  p.geometry = geometry_of(images, weight, mean, std);
  p.weight = weight.const_data_ptr();
  p.bias = data_or_null(bias);
  p.pos_embed = data_or_null(pos_embed);
  p.prefix = data_or_null(prefix);
  p.prefix_tokens = prefix.has_value() ? static_cast<int>(prefix->size(0)) : 0;
  p.embed = static_cast<int>(weight.size(0));
  p.dtype = dtype_of(weight);
  Tensor out =
      new_tensor(weight, {images.size(0), p.prefix_tokens + p.geometry.patches(), weight.size(0)},
                 weight.scalar_type());
  p.out = out.mutable_data_ptr();
  const int device = weight.get_device_index();
  launch_patch_embed(p, device, current_stream(device));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> patch_embed_backward(Tensor grad_out, Tensor images,
                                                        Tensor weight, OptionalTensor mean,
                                                        OptionalTensor std, bool images_grad,
                                                        bool weight_grad) {
  static CallCounter calls("patch_embed_backward.cuda");
  calls.add();
  const int device = weight.get_device_index();
  weight = aligned(weight);
  grad_out = aligned(grad_out);
  const ScalarType grad_images_type = images.scalar_type();
  images = readable(images, weight);
  PatchEmbedBackward p{};
  p.geometry = geometry_of(images, weight, mean, std);
  p.weight = weight.const_data_ptr();
  p.grad_out = grad_out.const_data_ptr();
  p.embed = static_cast<int>(weight.size(0));
  p.prefix_tokens = static_cast<int>(grad_out.size(1)) - p.geometry.patches();
  p.dtype = dtype_of(weight);

  Tensor grad_sum = new_tensor(weight, {grad_out.size(1), grad_out.size(2)}, ScalarType::Float);
  p.grad_sum = static_cast<float*>(grad_sum.mutable_data_ptr());

  Tensor grad_weight = new_tensor(weight, {0}, weight.scalar_type()), workspace = grad_weight;
  if (weight_grad) {
    grad_weight = torch::stable::empty_like(weight);
    p.grad_weight = grad_weight.mutable_data_ptr();
    p.splits = patch_embed_splits(p.geometry, p.embed, device);
    workspace = new_tensor(weight, {p.splits, weight.numel()}, ScalarType::Float);
    p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  }

  Tensor grad_images = new_tensor(weight, {0}, weight.scalar_type());
  PatchGeometry grads = p.geometry;
  if (images_grad) {
    const auto sizes = images.sizes();
    grad_images = new_tensor(images, {sizes.begin(), sizes.end()}, images.scalar_type());
    grads = geometry_of(grad_images, weight, mean, std);
    const bool covered =
        images.size(0) * p.geometry.patches() * p.geometry.values() == images.numel();
    if (!covered) torch::stable::zero_(grad_images);  // what fills no patch has no gradient
    p.grad_images = grad_images.mutable_data_ptr();
  }
  launch_patch_embed_backward(p, grads, device, current_stream(device));
  if (images_grad && grad_images.scalar_type() != grad_images_type)
    grad_images = torch::stable::to(grad_images, grad_images_type);
  return {grad_images, grad_weight, grad_sum};
}

}  // namespace
}  // namespace patchgen_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(patchgen_fast, CUDA, m) {
  m.impl("patch_embed.cuda", TORCH_BOX(&patchgen_fast::cuda::patch_embed));
  m.impl("patch_embed_backward.cuda", TORCH_BOX(&patchgen_fast::cuda::patch_embed_backward));
}
