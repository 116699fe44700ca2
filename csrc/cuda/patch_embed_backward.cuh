// Patch embedding, backward: three kernels and a reduction, all without atomics and in fixed order.
//
//     grad_weight[e, k] = sum over patches of grad_out[token, e] rounded(normalised patch[k])
//     grad_images       = (grad_out weight) / std, each pixel belonging to one patch
//     grad_sum          = grad_out summed over the batch
//
// Patches are gathered from the images again, not kept. Sums are float32.
#pragma once

#include "patches.cuh"

namespace patchgen_fast::cuda {

// workspace[split, e, k]: the part of grad_weight over one part of the patches. A block makes 128
// of e by 128 of k.
template <class Image, class T, int TOGETHER>
PATCHGEN_KERNEL(BlockTile::THREADS, BlockTile::blocks(sizeof(Image), TOGETHER))
patch_embed_weight_kernel(const PatchEmbedBackward p) {
  constexpr int SIDE = BlockTile::SIDE, DEPTH = BlockTile::DEPTH, STAGES = BlockTile::STAGES;
  using Rows = StageRows<Depth::DOWN>;
  constexpr int STAGE = stage_bytes<Depth::DOWN>();
  PATCHGEN_SHARED_MEMORY(memory);

  const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
  const PatchGeometry& g = p.geometry;
  const int patches = g.patches(), all_patches = g.batch * patches, values = g.values();
  const int embed_tiles = ceil_div(p.embed, SIDE), value_tiles = ceil_div(values, SIDE);
  const int tile = blockIdx.x % (embed_tiles * value_tiles);
  const int split = blockIdx.x / (embed_tiles * value_tiles);
  const int first_embed = tile / value_tiles * SIDE, first_value = tile % value_tiles * SIDE;
  // Whole stages, so that every split but the last is full.
  const int per_split = round_up(ceil_div(all_patches, p.splits), DEPTH);
  const int begin = min_of(split * per_split, all_patches);
  const int end = min_of(begin + per_split, all_patches);

  const uint32_t shared = shared_address(memory);
  auto grad_stage = [&](int stage) { return Rows{shared + stage % STAGES * STAGE}; };
  auto image_stage = [&](int stage) { return Rows{shared + (STAGES + stage % STAGES) * STAGE}; };
  const PatchTable<TOGETHER> table(shared + 2 * STAGES * STAGE, STAGES * DEPTH, values);
  auto slot = [](int stage) { return stage % STAGES * DEPTH; };
  auto list_patches = [&](int stage) {
    table.fill_patches(g, slot(stage), begin + stage * DEPTH, end, DEPTH, thread);
  };
  table.fill_values(g, values, thread);
  list_patches(0);
  list_patches(1);
  __syncthreads();

  const T* grad_out = static_cast<const T*>(p.grad_out);
  PatchLoader<Image, T, TOGETHER, DEPTH, SIDE> images;
  auto fetch = [&](int stage) {
    // Beside sums and pixels, registers do not hold the addresses of all stages.
    images.fetch(g, table, slot(stage), values, first_value, opaque(thread));
    auto grad_row = [&](int row) {
      const int patch = begin + stage * DEPTH + row;
      return patch < end ? grad_out + token_of(patch, patches, p.prefix_tokens) * p.embed : nullptr;
    };
    copy_tile_async<T, DEPTH>(grad_stage(stage), grad_row, p.embed, first_embed, grad_out, thread);
    copy_async_commit();
  };

  const WarpPlace place(warp);
  WarpAccumulators sum;
  sum.clear();
  const int stages = ceil_div(end - begin, DEPTH);
  if (stages > 0) fetch(0);
  PATCHGEN_NO_UNROLL
  for (int stage = 0; stage < stages; ++stage) {
    images.store(image_stage(stage), table, slot(stage), values, first_value, opaque(thread));
    copy_async_wait<0>();
    __syncthreads();  // this stage is here; the other one, and this one's slots, are read out
    if (stage + 1 < stages) fetch(stage + 1);
    list_patches(stage + 2);
    sum.template add_stage<T, Depth::DOWN, Depth::DOWN>(grad_stage(stage), image_stage(stage),
                                                        place.row, place.column, lane);
  }

  float* to = p.workspace + static_cast<int64_t>(split) * p.embed * values;
  PATCHGEN_UNROLL
  for (int m = 0; m < WarpAccumulators::DOWN; ++m) PATCHGEN_UNROLL
  for (int n = 0; n < WarpAccumulators::ALONG; ++n) PATCHGEN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int e = first_embed + place.row + 16 * m + lane / 4 + i / 2 * 8;
    const int k = first_value + place.column + 8 * n + lane % 4 * 2 + i % 2;
    if (e < p.embed && k < values) to[static_cast<int64_t>(e) * values + k] = sum.part[m][n][i];
  }
}

struct Reduction {
  static constexpr int THREADS = 256;
};

// grad_weight = workspace summed over the splits.
template <class T>
PATCHGEN_KERNEL(Reduction::THREADS, 4)
patch_embed_reduce_kernel(const PatchEmbedBackward p) {
  const int64_t count = static_cast<int64_t>(p.embed) * p.geometry.values();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * Reduction::THREADS + threadIdx.x;
  if (i >= count) return;
  float sum = 0.f;
  for (int split = 0; split < p.splits; ++split) sum += p.workspace[split * count + i];
  static_cast<T*>(p.grad_weight)[i] = from_float<T>(sum);
}

// grad_sum = grad_out summed over the batch, an element a thread.
template <class T>
PATCHGEN_KERNEL(Reduction::THREADS, 4)
patch_embed_sum_kernel(const PatchEmbedBackward p) {
  const int64_t count = static_cast<int64_t>(p.prefix_tokens + p.geometry.patches()) * p.embed;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * Reduction::THREADS + threadIdx.x;
  if (i >= count) return;
  const T* grad_out = static_cast<const T*>(p.grad_out) + i;
  float sum = 0.f;
  PATCHGEN_UNROLL_BY(8)
  for (int image = 0; image < p.geometry.batch; ++image) sum += to_float(grad_out[image * count]);
  p.grad_sum[i] = sum;
}

// A block makes the gradients of 128 patches by 128 of their values. The strides of the geometry
// are those of grad_images here.
template <class Image, class T>
PATCHGEN_KERNEL(BlockTile::THREADS, 2)
patch_embed_images_kernel(const PatchEmbedBackward p) {
  constexpr int SIDE = BlockTile::SIDE, DEPTH = BlockTile::DEPTH, STAGES = BlockTile::STAGES;
  using Grads = StageRows<Depth::ALONG>;
  using Weights = StageRows<Depth::DOWN>;
  constexpr int GRAD_STAGE = stage_bytes<Depth::ALONG>(), WEIGHT_STAGE = stage_bytes<Depth::DOWN>();
  PATCHGEN_SHARED_MEMORY(memory);

  const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
  const PatchGeometry& g = p.geometry;
  const int patches = g.patches(), all_patches = g.batch * patches, values = g.values();
  const int value_tiles = ceil_div(values, SIDE);
  const int first_value = blockIdx.x % value_tiles * SIDE;
  const int first_patch = blockIdx.x / value_tiles * SIDE;

  const uint32_t shared = shared_address(memory);
  auto grad_stage = [&](int stage) { return Grads{shared + stage % STAGES * GRAD_STAGE}; };
  auto weight_stage = [&](int stage) {
    return Weights{shared + STAGES * GRAD_STAGE + stage % STAGES * WEIGHT_STAGE};
  };
  const PatchTable<1> table(shared + STAGES * (GRAD_STAGE + WEIGHT_STAGE), SIDE, values);
  table.fill_patches(g, 0, first_patch, all_patches, SIDE, thread);
  table.fill_values(g, values, thread);

  const T* grad_out = static_cast<const T*>(p.grad_out);
  const T* weight = static_cast<const T*>(p.weight);
  auto fetch = [&](int stage) {
    auto grad_row = [&](int row) {
      const int patch = first_patch + row;
      return patch < all_patches ? grad_out + token_of(patch, patches, p.prefix_tokens) * p.embed
                                 : nullptr;
    };
    copy_tile_async<T, SIDE>(grad_stage(stage), grad_row, p.embed, stage * DEPTH, grad_out, thread);
    auto weight_row = [&](int row) {
      const int64_t e = stage * DEPTH + row;
      return e < p.embed ? weight + e * values : nullptr;
    };
    copy_tile_async<T, DEPTH>(weight_stage(stage), weight_row, values, first_value, weight, thread);
    copy_async_commit();
  };

  const WarpPlace place(warp);
  WarpAccumulators sum;
  sum.clear();
  const int stages = ceil_div(p.embed, DEPTH);
  fetch(0);
  PATCHGEN_NO_UNROLL
  for (int stage = 0; stage < stages; ++stage) {
    copy_async_wait<0>();
    __syncthreads();  // this stage is here, and the other one is read out
    if (stage + 1 < stages) fetch(stage + 1);
    sum.template add_stage<T, Depth::ALONG, Depth::DOWN>(grad_stage(stage), weight_stage(stage),
                                                         place.row, place.column, lane);
  }

  Image* to = static_cast<Image*>(p.grad_images);
  PATCHGEN_UNROLL
  for (int m = 0; m < WarpAccumulators::DOWN; ++m) PATCHGEN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t first_pixel = table.patch(place.row + 16 * m + 8 * half + lane / 4);
    if (first_pixel == NO_PATCH) continue;
    PATCHGEN_UNROLL
    for (int n = 0; n < WarpAccumulators::ALONG; ++n) PATCHGEN_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int value = first_value + place.column + 8 * n + lane % 4 * 2 + j;
      if (value >= values) continue;
      const Run run = table.run(value);
      to[first_pixel + run.offset] =
          from_float<Image>(sum.part[m][n][2 * half + j] * table.channel(run.channel).scale);
    }
  }
}

}  // namespace patchgen_fast::cuda
