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

// The most shared memory of any kernel that embeds such patches or takes gradients of it, with
// pixels loaded one by one: what patchgen_fast/ops/_cuda_limits.py computes for itself.
extern "C" int host_patch_embed_bytes(int channels, int side) {
  PatchEmbedBackward problem{};
  PatchGeometry& g = problem.geometry;
  g.image_dtype = DType::FLOAT32;
  g.column_stride = 2;  // no two pixels are adjacent
  g.channels = channels;
  g.patch_h = g.patch_w = side;
  g.batch = g.patch_t = g.grid_t = g.grid_h = g.grid_w = problem.embed = problem.splits = 1;
  problem.grad_weight = problem.grad_images = &problem;  // asked for; nothing is launched
  PatchEmbedForward forward{};
  forward.geometry = g;
  forward.embed = 1;
  int most = 0;
  auto look = [&](const Instance&, const Launch& launch, auto, const auto&...) {
    most = std::max(most, launch.shared_bytes);
  };
  plan_patch_embed<bfloat16>(forward, look);
  plan_patch_embed_backward<bfloat16>(problem, g, look);
  return most;
}
