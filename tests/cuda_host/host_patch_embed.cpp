// The patch embedding kernels of csrc/cuda, compiled for the host.
#include "host.h"
#include "patch_embed_plan.cuh"

extern "C" int host_patch_embed(const PatchEmbedForward* problem, const Options* options,
                                Result* result) {
  return with_dtype(problem->dtype, [&](auto element) {
    return run_on_host(*options, result,
                       [&](auto run) { plan_patch_embed<decltype(element)>(*problem, run); });
  });
}

extern "C" int host_patch_embed_splits(const PatchGeometry* geometry, int embed,
                                       int multiprocessors) {
  return plan_splits(*geometry, embed, multiprocessors);
}

extern "C" int host_patch_embed_backward(const PatchEmbedBackward* problem,
                                         const PatchGeometry* grad_geometry, const Options* options,
                                         Result* result) {
  return with_dtype(problem->dtype, [&](auto element) {
    return run_on_host(*options, result, [&](auto run) {
      plan_patch_embed_backward<decltype(element)>(*problem, *grad_geometry, run);
    });
  });
}

extern "C" void host_describe_patch_embed(char* text, int size) {
  describe_on_host(text, size,
                   [](auto run) { plan_every_patch_embed<bfloat16>(DType::BFLOAT16, run); });
}
