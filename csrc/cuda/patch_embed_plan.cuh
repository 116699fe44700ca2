// Which instances of the patch embedding kernels serve a problem, and with how many blocks.
#pragma once

#include <algorithm>

#include "patch_embed_backward.cuh"
#include "patch_embed_forward.cuh"
#include "plan.h"

namespace patchgen_fast::cuda {

// Calls use(Pixel{}) with the type of a pixel: uint8, float, or T itself. The torch boundary makes
// images of the other 16-bit type float.
template <class T, class Use>
void with_pixel(DType dtype, Use&& use) {
  if (dtype == DType::UINT8) return use(uint8_t{});
#if !defined(PATCHGEN_FEWER_INSTANCES)
  if (dtype != DType::FLOAT32) return use(T{});
#endif
  return use(float{});
}

// Whether `together` pixels, beginning where a patch's row does, can be loaded at once.
inline bool loads_together(const PatchGeometry& g, int together, int pixel_bytes) {
  const int64_t bytes = std::min(16, together * pixel_bytes);
  auto aligned = [&](int64_t stride, int count) {
    return count <= 1 || stride * pixel_bytes % bytes == 0;
  };
  return g.patch_w % together == 0 && g.column_stride == 1 &&
         reinterpret_cast<uintptr_t>(g.images) % bytes == 0 && aligned(g.patch_w, g.grid_w) &&
         aligned(g.row_stride, g.grid_h * g.patch_h) &&
         aligned(g.time_stride, g.grid_t * g.patch_t) && aligned(g.channel_stride, g.channels) &&
         aligned(g.batch_stride, g.batch);
}

// Calls use(Constant<N>): 8, 2 (patches of 14 pixels) or 1 pixels a load.
template <class Use>
void with_pixels_together(const PatchGeometry& g, int pixel_bytes, Use&& use) {
  if (loads_together(g, 8, pixel_bytes)) return use(Constant<8>{});
  if (loads_together(g, 2, pixel_bytes)) return use(Constant<2>{});
  return use(Constant<1>{});
}

inline int64_t tiles(int64_t count) {
  return (count + BlockTile::SIDE - 1) / BlockTile::SIDE;
}

// Calls run(instance, launch, kernel, arguments...).
template <class T, class Run>
void plan_patch_embed(const PatchEmbedForward& p, Run&& run) {
  const PatchGeometry& g = p.geometry;
  const int64_t patches = static_cast<int64_t>(g.batch) * g.patches();
  if (patches == 0 || p.embed == 0) return;
  constexpr int STAGES = 2 * BlockTile::STAGES * stage_bytes<Depth::ALONG>();
  with_pixel<T>(g.image_dtype, [&](auto pixel) {
    using Pixel = decltype(pixel);
    with_pixels_together(g, sizeof(Pixel), [&](auto together) {
      run(Instance{"patch_embed_forward", p.dtype, together, 0, g.image_dtype},
          Launch{tiles(patches) * tiles(p.embed), BlockTile::THREADS,
                 STAGES + PatchTable<together>::bytes(BlockTile::SIDE, g.values(), g.channels)},
          Kernel<patch_embed_forward_kernel<Pixel, T, together>>{}, p);
    });
  });
}

// Enough parts for two blocks a multiprocessor, none shorter than 8 stages.
inline int plan_splits(const PatchGeometry& g, int embed, int multiprocessors) {
  const int64_t blocks = std::max<int64_t>(1, tiles(embed) * tiles(g.values()));
  const int64_t patches = static_cast<int64_t>(g.batch) * g.patches();
  const int64_t most = std::max<int64_t>(1, patches / (8 * BlockTile::DEPTH));
  return static_cast<int>(std::clamp<int64_t>(2 * multiprocessors / blocks, 1, most));
}

// The gradients that are asked for, one kernel after another. `images` has the strides of what is
// read, grad_images is contiguous.
template <class T, class Run>
void plan_patch_embed_backward(const PatchEmbedBackward& p, const PatchGeometry& grad_geometry,
                               Run&& run) {
  const PatchGeometry& g = p.geometry;
  const int64_t patches = static_cast<int64_t>(g.batch) * g.patches();
  auto reduction = [](int64_t count) {
    return Launch{(count + Reduction::THREADS - 1) / Reduction::THREADS, Reduction::THREADS, 0};
  };
  const int64_t sums = static_cast<int64_t>(p.prefix_tokens + g.patches()) * p.embed;
  if (sums > 0)
    run(Instance{"patch_embed_sum", p.dtype, 0}, reduction(sums),
        Kernel<patch_embed_sum_kernel<T>>{}, p);
  const int64_t weights = static_cast<int64_t>(p.embed) * g.values();
  if (p.grad_weight && weights > 0) {
    constexpr int STAGES = 2 * BlockTile::STAGES * stage_bytes<Depth::DOWN>();
    with_pixel<T>(g.image_dtype, [&](auto pixel) {
      using Pixel = decltype(pixel);
      with_pixels_together(g, sizeof(Pixel), [&](auto together) {
        run(Instance{"patch_embed_weight", p.dtype, together, 0, g.image_dtype},
            Launch{tiles(p.embed) * tiles(g.values()) * p.splits, BlockTile::THREADS,
                   STAGES + PatchTable<together>::bytes(BlockTile::STAGES * BlockTile::DEPTH,
                                                        g.values(), g.channels)},
            Kernel<patch_embed_weight_kernel<Pixel, T, together>>{}, p);
      });
    });
    run(Instance{"patch_embed_reduce", p.dtype, 0}, reduction(weights),
        Kernel<patch_embed_reduce_kernel<T>>{}, p);
  }
  if (p.grad_images && patches > 0) {
    PatchEmbedBackward q = p;
    q.geometry = grad_geometry;
    constexpr int STAGES =
        BlockTile::STAGES * (stage_bytes<Depth::ALONG>() + stage_bytes<Depth::DOWN>());
    with_pixel<T>(g.image_dtype, [&](auto pixel) {
      using Pixel = decltype(pixel);
      if constexpr (sizeof(Pixel) > 1)  // bytes have no gradient
        run(Instance{"patch_embed_images", p.dtype, 0, 0, g.image_dtype},
            Launch{tiles(patches) * tiles(g.values()), BlockTile::THREADS,
                   STAGES + PatchTable<1>::bytes(BlockTile::SIDE, g.values(), g.channels)},
            Kernel<patch_embed_images_kernel<Pixel, T>>{}, q);
    });
  }
}

// Every instance, at ViT-B/16's size (p14 where pixels are loaded in pairs, p7 one by one).
template <class T, class Run>
void plan_every_patch_embed(DType dtype, Run&& run) {
  for (DType pixel : {DType::UINT8, dtype, DType::FLOAT32})
    for (int side : {16, 14, 7}) {
      PatchGeometry g{};
      g.image_dtype = pixel;
      g.batch = g.patch_t = g.grid_t = 1;
      g.channels = 3;
      g.patch_h = g.patch_w = side;
      g.grid_h = g.grid_w = 224 / side;
      g.channel_stride = 224 * 224;
      g.row_stride = 224;
      g.column_stride = 1;
      PatchEmbedForward forward{};
      forward.geometry = g;
      forward.embed = 768;
      forward.dtype = dtype;
      plan_patch_embed<T>(forward, run);
      PatchEmbedBackward backward{};
      backward.geometry = g;
      backward.embed = 768;
      backward.dtype = dtype;
      backward.splits = 1;
      backward.grad_weight = backward.grad_images = &backward;  // asked for; nothing is launched
      plan_patch_embed_backward<T>(backward, g, run);
    }
}

}  // namespace patchgen_fast::cuda
