// Launching and describing the patch embedding kernels; instantiated by patch_embed_*.cu.
#pragma once

#include "launch.cuh"
#include "patch_embed_plan.cuh"

namespace patchgen_fast::cuda {

inline std::string shape_of(const PatchGeometry& g, int embed) {
  return "batch=" + std::to_string(g.batch) + ", channels=" + std::to_string(g.channels) +
         ", patches=" + std::to_string(g.grid_t) + "x" + std::to_string(g.grid_h) + "x" +
         std::to_string(g.grid_w) + ", patch=" + std::to_string(g.patch_t) + "x" +
         std::to_string(g.patch_h) + "x" + std::to_string(g.patch_w) +
         ", embed=" + std::to_string(embed);
}

// Kernels count patches, and the pixels that a patch spans in memory, by 31 bits.
inline void check_counts(const PatchGeometry& g, int embed) {
  constexpr int64_t MOST = INT32_MAX - BlockTile::SIDE;
  const int64_t patches = static_cast<int64_t>(g.batch) * g.patches();
  const int64_t span = (g.channels - 1) * g.channel_stride + (g.patch_t - 1) * g.time_stride +
                       (g.patch_h - 1) * g.row_stride + (g.patch_w - 1) * g.column_stride;
  if (patches > MOST || span > MOST)
    fail("patch_embed for " + shape_of(g, embed) + " counts beyond 2^31 (patches: " +
             std::to_string(patches) + ", pixels that a patch spans: " + std::to_string(span) + ")",
         "split the batch, or make the images contiguous");
}

template <class T>
void launch_patch_embed_as(const PatchEmbedForward& p, int device, void* stream) {
  check_counts(p.geometry, p.embed);
  Launcher run(device, stream, [&] { return shape_of(p.geometry, p.embed); });
  plan_patch_embed<T>(p, run);
}

template <class T>
void launch_patch_embed_backward_as(const PatchEmbedBackward& p, const PatchGeometry& grads,
                                    int device, void* stream) {
  check_counts(p.geometry, p.embed);
  Launcher run(device, stream, [&] { return shape_of(p.geometry, p.embed); });
  plan_patch_embed_backward<T>(p, grads, run);
}

template <class T>
void describe_patch_embed_as(DType dtype, int device, std::vector<KernelFacts>& list) {
  plan_every_patch_embed<T>(dtype, Describer(device, list));
}

#define PATCHGEN_EXTERN(prefix, T)                                                          \
  prefix template void launch_patch_embed_as<T>(const PatchEmbedForward&, int, void*);      \
  prefix template void launch_patch_embed_backward_as<T>(const PatchEmbedBackward&,         \
                                                         const PatchGeometry&, int, void*); \
  prefix template void describe_patch_embed_as<T>(DType, int, std::vector<KernelFacts>&);
PATCHGEN_EXTERN(extern, bfloat16)
PATCHGEN_EXTERN(extern, float16)

}  // namespace patchgen_fast::cuda
