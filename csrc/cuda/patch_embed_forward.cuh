// Patch embedding, forward: from images to tokens in one kernel.
//
//     out[b, prefix_tokens + n] = rounded((patch n of image b - mean) / std) weight^T
//                                 + bias + pos_embed[n]
//     out[b, :prefix_tokens] = prefix
//
// A block makes 128 tokens by 128 of their elements. Blocks of the same tokens run side by side, so
// the images are read from memory once and from the L2 cache embed / 128 times.
// Sums are float32; bias and position are added before the only rounding.
#pragma once

#include "patches.cuh"

namespace patchgen_fast::cuda {

// The block that holds an image's first patch also writes its prefix, in its columns.
template <class T>
PATCHGEN_DEVICE void write_prefix(const PatchEmbedForward& p, int first_patch, int end_patch,
                                  int first_column, int thread) {
  const int patches = p.geometry.patches();
  const int columns = min_of(BlockTile::SIDE, p.embed - first_column);
  for (int image = ceil_div(first_patch, patches); image * patches < end_patch; ++image)
    for (int i = thread; i < p.prefix_tokens * columns; i += BlockTile::THREADS) {
      const int row = i / columns, column = first_column + i % columns;
      const int64_t token = static_cast<int64_t>(image) * (p.prefix_tokens + patches) + row;
      static_cast<T*>(p.out)[token * p.embed + column] =
          static_cast<const T*>(p.prefix)[static_cast<int64_t>(row) * p.embed + column];
    }
}

// Image: the type of a pixel. TOGETHER: adjacent pixels that one load can take.
template <class Image, class T, int TOGETHER>
PATCHGEN_KERNEL(BlockTile::THREADS, BlockTile::blocks(sizeof(Image), TOGETHER))
patch_embed_forward_kernel(const PatchEmbedForward p) {
  constexpr int SIDE = BlockTile::SIDE, DEPTH = BlockTile::DEPTH, STAGES = BlockTile::STAGES;
  using Rows = StageRows<Depth::ALONG>;
  constexpr int STAGE = stage_bytes<Depth::ALONG>();
  PATCHGEN_SHARED_MEMORY(memory);

  const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
  const PatchGeometry& g = p.geometry;
  const int column_tiles = ceil_div(p.embed, SIDE);
  const int first_column = blockIdx.x % column_tiles * SIDE;
  const int first_patch = blockIdx.x / column_tiles * SIDE;
  const int patches = g.patches(), all_patches = g.batch * patches, values = g.values();

  const uint32_t shared = shared_address(memory);
  auto image_stage = [&](int stage) { return Rows{shared + stage % STAGES * STAGE}; };
  auto weight_stage = [&](int stage) { return Rows{shared + (STAGES + stage % STAGES) * STAGE}; };
  const PatchTable<TOGETHER> table(shared + 2 * STAGES * STAGE, SIDE, values);
  table.fill_patches(g, 0, first_patch, all_patches, SIDE, thread);
  table.fill_values(g, values, thread);
  __syncthreads();

  const T* weight = static_cast<const T*>(p.weight);
  PatchLoader<Image, T, TOGETHER, SIDE, DEPTH> images;
  auto fetch = [&](int stage) {
    images.fetch(g, table, 0, values, stage * DEPTH, thread);
    auto weight_row = [&](int row) {
      const int64_t column = first_column + row;
      return column < p.embed ? weight + column * values : nullptr;
    };
    copy_tile_async<T, SIDE>(weight_stage(stage), weight_row, values, stage * DEPTH, weight,
                             thread);
    copy_async_commit();
  };

  const WarpPlace place(warp);
  WarpAccumulators sum;
  sum.clear();
  const int stages = ceil_div(values, DEPTH);
  fetch(0);
  PATCHGEN_NO_UNROLL
  for (int stage = 0; stage < stages; ++stage) {
    images.store(image_stage(stage), table, 0, values, stage * DEPTH, thread);
    copy_async_wait<0>();
    __syncthreads();  // this stage is here, and the other one is read out
    if (stage + 1 < stages) fetch(stage + 1);
    sum.template add_stage<T, Depth::ALONG, Depth::ALONG>(image_stage(stage), weight_stage(stage),
                                                          place.row, place.column, lane);
  }

  // ---- results: rounded in the place of the stages, then written 16 bytes at a time
  __syncthreads();
  const SharedRows<BlockTile::WARP_COLUMNS> own{
      shared + warp * SharedRows<BlockTile::WARP_COLUMNS>::bytes(BlockTile::WARP_ROWS)};
  const int own_patch = first_patch + place.row;
  const int own_column = first_column + place.column;
  const T* bias = static_cast<const T*>(p.bias);
  const T* pos_embed = static_cast<const T*>(p.pos_embed);
  PATCHGEN_UNROLL
  for (int m = 0; m < WarpAccumulators::DOWN; ++m) PATCHGEN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * m + 8 * half + lane / 4;
    const int64_t position = static_cast<int64_t>((own_patch + row) % patches) * p.embed;
    PATCHGEN_UNROLL
    for (int n = 0; n < WarpAccumulators::ALONG; ++n) {
      float pair[2];
      PATCHGEN_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int column = own_column + 8 * n + lane % 4 * 2 + j;
        pair[j] = sum.part[m][n][2 * half + j];
        if (column < p.embed) {
          if (bias) pair[j] += to_float(bias[column]);
          if (pos_embed) pair[j] += to_float(pos_embed[position + column]);
        }
      }
      shared_at<uint32_t>(own.at(row, n) + lane % 4 * 4) = pack<T>(pair[0], pair[1]);
    }
  }
  __syncwarp();
  for (int i = lane; i < BlockTile::WARP_ROWS * WarpAccumulators::ALONG; i += WARP) {
    const int row = i / WarpAccumulators::ALONG, chunk = i % WarpAccumulators::ALONG;
    const int patch = own_patch + row;
    const int column = own_column + chunk * CHUNK;
    if (patch >= all_patches || column >= p.embed) continue;
    T* to = static_cast<T*>(p.out) + token_of(patch, patches, p.prefix_tokens) * p.embed + column;
    const uint32_t from = own.at(row, chunk);
    if (p.embed % CHUNK == 0)
      *reinterpret_cast<uint4*>(to) = shared_at<uint4>(from);
    else
      for (int j = 0; j < min_of(CHUNK, p.embed - column); ++j)
        to[j] = shared_at<T>(from + j * static_cast<uint32_t>(sizeof(T)));
  }
  write_prefix<T>(p, first_patch, min_of(first_patch + SIDE, all_patches), first_column, thread);
}

}  // namespace patchgen_fast::cuda
