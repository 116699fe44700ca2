// Runs the matrix-product kernels on torch's threads: what the boundaries of all layers share.
#pragma once

#include "boundary.h"
#include "gemm_outer.h"
#include "gemm_sums.h"
#include "linear.h"
#include "patch_embed.h"
#include "patch_unembed.h"

namespace patchgen_fast {

// Each fills in `packed` and runs; the other fields are the caller's.
void run_linear(LinearForward f);
void run_patch_embed(PatchEmbedForward f);
void run_patch_unembed(PatchUnembed u);

// Fills in `packed` and `sums`. With no tokens at all, the result is zeros.
void run_outer(OuterProduct o);

void run_activation_backward(const ActivationBackward& b);
void run_column_sums(const ColumnSums& s);

// How `images` are cut by `weight`, read in interleaved order where they lie so and `interleave`.
PatchGrid patch_grid(const Tensor& images, const Tensor& weight, bool interleave);

}  // namespace patchgen_fast
