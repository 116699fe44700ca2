// Arguments of the patch-embed kernels: plain pointers and sizes, free of torch.
#pragma once

#include "dtype.h"
#include "gemm.h"

namespace patchgen_fast {

// Images and how they are cut into patches. [B,C,T,H,W]; still images have T = patch_t = 1.
struct PatchGrid {
  int64_t batch, channels;
  int64_t stride_b, stride_c, stride_t, stride_h, stride_w;  // elements
  int64_t grid_t, grid_h, grid_w;                            // patches
  int64_t patch_t, patch_h, patch_w;

  // Pixels whose channels lie side by side are read in that order, and the weights are permuted to
  // match while they are packed. Otherwise lines are read channel by channel.
  bool interleaved;

  int64_t patches() const { return grid_t * grid_h * grid_w; }
  int64_t depth() const { return channels * patch_t * patch_h * patch_w; }
};

// Images as an operand: normalised and cut into patches while they are read.
struct PatchSource {
  PatchGrid grid;
  const void* images;
  Dtype dtype;
  const float* mean;  // [C] on the 0 to 1 scale, or null
  const float* std;   // [C], or null
};

struct PatchEmbedForward {
  PatchSource source;
  Dtype dtype;            // of weight, bias, pos_embed, prefix and out
  const void* weight;     // [E, C, patch_t, patch_h, patch_w]
  const void* bias;       // [E] or null
  const void* pos_embed;  // [N, E] or null
  const void* prefix;     // [prefix_tokens, E] or null
  int64_t prefix_tokens;
  int64_t embed;
  void* packed;  // GemmPlan::packed_bytes, aligned to 64
  void* out;     // [B, prefix_tokens + N, E]
};

}  // namespace patchgen_fast
