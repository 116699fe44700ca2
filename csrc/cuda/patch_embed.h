// What a patch embedding kernel is asked to do. Neither torch nor CUDA is needed to read this.
//
// A patch is a vector of `values()` pixels, ordered (channel, time, row, column) as the weights
// are; patch n of an image is its n-th, row by row.
#pragma once

#include <cstdint>

#include "dtype.h"

#if defined(__CUDACC__)
#define PATCHGEN_BOTH_SIDES __host__ __device__
#else
#define PATCHGEN_BOTH_SIDES
#endif

namespace patchgen_fast::cuda {

struct PatchGeometry {
  const void* images;  // [batch, channels, (time,) height, width]
  DType image_dtype;   // UINT8 (scaled to 0..1), FLOAT32, or one of the 16-bit floats
  int64_t batch_stride, channel_stride, time_stride, row_stride, column_stride;  // in elements
  int batch, channels;
  int patch_t, patch_h, patch_w;  // pixels of a patch
  int grid_t, grid_h, grid_w;     // patches of an image
  const float* mean;              // [channels], or null: 0
  const float* std;               // [channels], or null: 1

  PATCHGEN_BOTH_SIDES int values() const { return channels * patch_t * patch_h * patch_w; }
  PATCHGEN_BOTH_SIDES int patches() const { return grid_t * grid_h * grid_w; }
};

// tokens = rounded((images - mean) / std) weight^T + bias + pos_embed, prefix before
struct PatchEmbedForward {
  PatchGeometry geometry;
  const void* weight;     // [embed, values]
  const void* bias;       // [embed], or null
  const void* pos_embed;  // [patches, embed], or null
  const void* prefix;     // [prefix_tokens, embed], or null
  void* out;              // [batch, prefix_tokens + patches, embed]
  int prefix_tokens, embed;
  DType dtype;  // of all but the images: BFLOAT16 or FLOAT16
};

struct PatchEmbedBackward {
  PatchGeometry geometry;
  const void* weight;    // [embed, values]
  const void* grad_out;  // [batch, prefix_tokens + patches, embed], contiguous
  void* grad_images;     // contiguous, of the images' dtype, zero outside the patches; or null
  void* grad_weight;     // [embed, values], or null
  float* grad_sum;       // [prefix_tokens + patches, embed]: grad_out summed over the batch
  float* workspace;      // [splits, embed, values], for grad_weight
  int splits;            // of the patches, for grad_weight
  int prefix_tokens, embed;
  DType dtype;
};

// In how many parts grad_weight is summed, so that its few tiles fill the GPU.
int patch_embed_splits(const PatchGeometry& geometry, int embed, int device);

void launch_patch_embed(const PatchEmbedForward& problem, int device, void* stream);
// `grads`: the geometry with the strides of grad_images.
void launch_patch_embed_backward(const PatchEmbedBackward& problem, const PatchGeometry& grads,
                                 int device, void* stream);

}  // namespace patchgen_fast::cuda
