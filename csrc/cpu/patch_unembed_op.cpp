// patch_unembed on the CPU: the torch boundary of its forward and backward.
#include "../counters.h"
#include "gemm_run.h"

namespace patchgen_fast {
namespace {

Tensor patch_unembed(Tensor tokens, Tensor weight, OptionalTensor bias, int64_t grid_h,
                     int64_t grid_w) {
  static CallCounter calls("patch_unembed.cpu");
  calls.add();
  Tensor images =
      new_tensor({tokens.size(0), weight.size(1), grid_h * weight.size(2), grid_w * weight.size(3)},
                 tokens.scalar_type());
  PatchUnembed u{};
  u.grid = patch_grid(images, weight, false);
  u.images = images.mutable_data_ptr();
  u.image_dtype = u.dtype = dtype_of(tokens);
  u.tokens = tokens.const_data_ptr();
  u.token_group_stride = u.grid.patches() * weight.size(0);
  u.weight = weight.const_data_ptr();
  u.bias = data_or_null(bias);
  u.embed = weight.size(0);
  run_patch_unembed(u);
  return images;
}

// -- backward: cutting the images' gradient into patches is patch_embed's forward -----------------

PatchSource gradient_source(const Tensor& grad_images, const Tensor& weight, bool interleave) {
  return {patch_grid(grad_images, weight, interleave), grad_images.const_data_ptr(),
          dtype_of(grad_images), nullptr, nullptr};
}

Tensor grad_of_tokens(const Tensor& grad_images, const Tensor& tokens, const Tensor& weight) {
  Tensor grad = new_tensor({tokens.size(0), tokens.size(1), tokens.size(2)}, tokens.scalar_type());
  PatchEmbedForward f{};
  f.source = gradient_source(grad_images, weight, true);
  f.dtype = dtype_of(weight);
  f.weight = weight.const_data_ptr();
  f.embed = weight.size(0);
  f.out = grad.mutable_data_ptr();
  run_patch_embed(f);
  return grad;
}

Tensor grad_of_weight(const Tensor& grad_images, const Tensor& tokens, const Tensor& weight) {
  Tensor grad = new_like(weight);
  OuterProduct o{};
  o.patches = gradient_source(grad_images, weight, false);
  const PatchGrid& g = o.patches.grid;
  o.rows = weight.size(0);
  o.columns = g.depth();
  o.depth = g.batch * g.patches();
  o.dtype = dtype_of(weight);
  o.left = tokens.const_data_ptr();
  o.left_group = g.patches();
  o.left_group_stride = g.patches() * weight.size(0);
  o.out = grad.mutable_data_ptr();
  run_outer(o);
  return grad;
}

// [C], summed over images and pixels: over the images by the kernel, then over each channel's
// pixels.
Tensor grad_of_bias(const Tensor& grad_images, const Tensor& weight) {
  const Tensor images = as_contiguous(grad_images);
  const int64_t channels = images.size(1);
  const int64_t pixels = images.size(2) * images.size(3);
  const Tensor sums = new_tensor({channels, pixels}, ScalarType::Float);
  float* per_pixel = static_cast<float*>(sums.mutable_data_ptr());
  run_column_sums({images.size(0), channels * pixels, channels * pixels, dtype_of(images),
                   images.const_data_ptr(), per_pixel});
  Tensor grad = new_tensor({channels}, ScalarType::Float);
  float* per_channel = static_cast<float*>(grad.mutable_data_ptr());
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t p = 0; p < pixels; ++p) {
      sum += per_pixel[c * pixels + p];
    }
    per_channel[c] = static_cast<float>(sum);
  }
  return torch::stable::to(grad, weight.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> patch_unembed_backward(Tensor grad_images, Tensor tokens,
                                                          Tensor weight, bool bias_grad) {
  static CallCounter calls("patch_unembed_backward.cpu");
  calls.add();
  tokens = as_contiguous(tokens);
  return {grad_of_tokens(grad_images, tokens, weight), grad_of_weight(grad_images, tokens, weight),
          bias_grad ? grad_of_bias(grad_images, weight) : nothing(weight)};
}

}  // namespace
}  // namespace patchgen_fast

// The stable ABI has no SymInt: Python registers patch_unembed.cpu as a call of this raw op.
STABLE_TORCH_LIBRARY_FRAGMENT(patchgen_fast_native, m) {
  m.def(
      "patch_unembed(Tensor tokens, Tensor weight, Tensor? bias, int grid_h, int grid_w) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(patchgen_fast_native, CPU, m) {
  m.impl("patch_unembed", TORCH_BOX(&patchgen_fast::patch_unembed));
}

STABLE_TORCH_LIBRARY_IMPL(patchgen_fast, CPU, m) {
  m.impl("patch_unembed_backward.cpu", TORCH_BOX(&patchgen_fast::patch_unembed_backward));
}
