// patch_embed on the CPU: the torch boundary of patch_embed_kernel.h.
#include <cstring>

#include "../counters.h"
#include "boundary.h"
#include "kernels.h"
#include "patch_embed.h"

namespace patchgen_fast {
namespace {

// images [B,C,H,W] or [B,C,T,H,W]; weight [E,C,(Pt,)Ph,Pw].
PatchGrid patch_grid(const Tensor& images, const Tensor& weight) {
  const bool video = images.dim() == 5;
  const int64_t h = images.dim() - 2;
  PatchGrid g{};
  g.batch = images.size(0);
  g.channels = images.size(1);
  g.stride_b = images.stride(0);
  g.stride_c = images.stride(1);
  g.stride_t = video ? images.stride(2) : 0;
  g.stride_h = images.stride(h);
  g.stride_w = images.stride(h + 1);
  g.patch_t = video ? weight.size(2) : 1;
  g.patch_h = weight.size(h);
  g.patch_w = weight.size(h + 1);
  g.grid_t = video ? images.size(2) / g.patch_t : 1;
  g.grid_h = images.size(h) / g.patch_h;
  g.grid_w = images.size(h + 1) / g.patch_w;
  return g;
}

// Images too small for a patch still have their prefix tokens.
void write_prefix_only(const PatchEmbedForward& f) {
  const size_t bytes = static_cast<size_t>(f.prefix_tokens * f.embed) * size_of(f.dtype);
  for (int64_t b = 0; b < f.grid.batch && bytes > 0; ++b) {
    std::memcpy(static_cast<char*>(f.out) + static_cast<size_t>(b) * bytes, f.prefix, bytes);
  }
}

void run(PatchEmbedForward& f) {
  const KernelTable& table = kernels();
  const Parallel parallel = torch_parallel();
  const GemmPlan plan = table.patch_embed_plan(f, parallel.threads);
  if (plan.tasks == 0) {
    return write_prefix_only(f);
  }
  const Tensor packed = new_tensor({static_cast<int64_t>(plan.packed_bytes)}, ScalarType::Byte);
  f.packed = packed.mutable_data_ptr();
  for_each_task(parallel, plan.panels, plan.pack_scratch_bytes, [&](int64_t task, void* scratch) {
    table.patch_embed_pack(f, plan, task, scratch);
  });
  for_each_task(parallel, plan.tasks, plan.scratch_bytes, [&](int64_t task, void* scratch) {
    table.patch_embed_forward(f, plan, task, scratch);
  });
}

Tensor patch_embed(Tensor images, Tensor weight, OptionalTensor bias, OptionalTensor pos_embed,
                   OptionalTensor prefix, OptionalTensor mean, OptionalTensor std) {
  static CallCounter calls("patch_embed.cpu");
  calls.add();
  PatchEmbedForward f{};
  f.grid = patch_grid(images, weight);
  f.images = images.const_data_ptr();
  f.image_dtype = dtype_of(images);
  f.mean = data_or_null<float>(mean);
  f.std = data_or_null<float>(std);
  f.dtype = dtype_of(weight);
  f.weight = weight.const_data_ptr();
  f.bias = data_or_null(bias);
  f.pos_embed = data_or_null(pos_embed);
  f.prefix = data_or_null(prefix);
  f.prefix_tokens = prefix.has_value() ? prefix->size(0) : 0;
  f.embed = weight.size(0);
  Tensor out =
      new_tensor({f.grid.batch, f.prefix_tokens + f.grid.patches(), f.embed}, weight.scalar_type());
  f.out = out.mutable_data_ptr();
  run(f);
  return out;
}

}  // namespace
}  // namespace patchgen_fast

STABLE_TORCH_LIBRARY_IMPL(patchgen_fast, CPU, m) {
  m.impl("patch_embed.cpu", TORCH_BOX(&patchgen_fast::patch_embed));
}
