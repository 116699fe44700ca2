// Arguments of the kernels that put patches back into images. Free of torch.
#pragma once

#include "patch_embed.h"

namespace patchgen_fast {

// images = paste(tokens @ weight) / std + bias
//
// The forward of patch_unembed, and the gradient of patch_embed's images.
struct PatchUnembed {
  PatchGrid grid;  // of the images written; width stride 1
  void* images;
  Dtype image_dtype;
  Dtype dtype;         // of tokens, weight and bias
  const void* tokens;  // the patches' tokens, [N, E] a contiguous group for each image
  int64_t token_group_stride;
  const void* weight;  // [E, C, patch_t, patch_h, patch_w]
  const void* bias;    // [C] or null
  const float* std;    // [C] or null
  int64_t embed;
  void* packed;  // GemmPlan::packed_bytes, aligned to 64
};

}  // namespace patchgen_fast
