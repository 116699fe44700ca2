// Arguments of the product of two tall matrices, the gradient of a weight. Free of torch.
#pragma once

#include "gemm.h"
#include "patch_embed.h"

namespace patchgen_fast {

// out[rows, columns] = left[depth, rows]^T @ right[depth, columns]
//
// The depth is the number of tokens. It is cut into stages; the sums over the stages done are kept
// in `sums`. `right` is a matrix, or patches of images, cut as they are read.
struct OuterProduct {
  int64_t rows, columns, depth;
  Dtype dtype;  // of left, out and a matrix `right`
  const void* left;
  int64_t left_group, left_group_stride;  // rows of left: so many side by side, then the next group
  const void* right;                      // [depth, columns], or null: `patches`
  PatchSource patches;
  float* sums;   // [rows, columns]
  void* packed;  // GemmPlan::packed_bytes, aligned to 64
  void* out;     // [rows, columns]
};

}  // namespace patchgen_fast
