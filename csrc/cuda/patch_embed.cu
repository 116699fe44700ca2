#include "patch_embed_launch.cuh"

namespace patchgen_fast::cuda {

int patch_embed_splits(const PatchGeometry& geometry, int embed, int device) {
  return plan_splits(geometry, embed, device_facts(device).multiprocessors);
}

void launch_patch_embed(const PatchEmbedForward& p, int device, void* stream) {
  if (p.dtype == DType::BFLOAT16) return launch_patch_embed_as<bfloat16>(p, device, stream);
  launch_patch_embed_as<float16>(p, device, stream);
}

void launch_patch_embed_backward(const PatchEmbedBackward& p, const PatchGeometry& grads,
                                 int device, void* stream) {
  if (p.dtype == DType::BFLOAT16)
    return launch_patch_embed_backward_as<bfloat16>(p, grads, device, stream);
  launch_patch_embed_backward_as<float16>(p, grads, device, stream);
}

void describe_patch_embed(int device, std::vector<KernelFacts>& list) {
  describe_patch_embed_as<bfloat16>(DType::BFLOAT16, device, list);
  describe_patch_embed_as<float16>(DType::FLOAT16, device, list);
}

}  // namespace patchgen_fast::cuda
