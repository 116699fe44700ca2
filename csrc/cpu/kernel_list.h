// Every kernel that is compiled once per instruction set: KERNEL(name, signature). A new kernel is
// one line here, the header of its arguments, and the header of its code in kernels_isa.h.
#pragma once

#include "attention.h"
#include "attention_decode.h"
#include "gemm_outer.h"
#include "gemm_sums.h"
#include "layer_norm.h"
#include "linear.h"
#include "patch_embed.h"
#include "patch_unembed.h"
#include "qk_norm_rope.h"

// clang-format off
#define PATCHGEN_FAST_KERNELS(KERNEL) \
  KERNEL(attention_plan, AttentionPlan(const AttentionForward&, int64_t threads)) \
  KERNEL(attention_forward, void(const AttentionForward&, const AttentionPlan&, int64_t task, void* scratch)) \
  KERNEL(attention_decode_plan, AttentionPlan(const AttentionDecode&, int64_t threads)) \
  KERNEL(attention_decode, void(const AttentionDecode&, const AttentionPlan&, int64_t task, void* scratch)) \
  KERNEL(attention_decode_join, void(const AttentionDecode&, const AttentionPlan&, int64_t task)) \
  KERNEL(attention_backward_plan, AttentionPlan(const AttentionBackward&)) \
  KERNEL(attention_backward, void(const AttentionBackward&, int64_t task, void* scratch)) \
  KERNEL(attention_mask_gradient_plan, AttentionPlan(const AttentionBackward&)) \
  KERNEL(attention_mask_gradient, void(const AttentionBackward&, int64_t task, void* scratch)) \
  KERNEL(patch_embed_plan, GemmPlan(const PatchEmbedForward&, int64_t threads)) \
  KERNEL(patch_embed_pack, void(const PatchEmbedForward&, const GemmPlan&, int64_t task, void* scratch)) \
  KERNEL(patch_embed_forward, void(const PatchEmbedForward&, const GemmPlan&, int64_t task, void* scratch)) \
  KERNEL(patch_unembed_plan, GemmPlan(const PatchUnembed&, int64_t threads)) \
  KERNEL(patch_unembed_pack, void(const PatchUnembed&, const GemmPlan&, int64_t task)) \
  KERNEL(patch_unembed_run, void(const PatchUnembed&, const GemmPlan&, int64_t task, void* scratch)) \
  KERNEL(linear_plan, GemmPlan(const LinearForward&, int64_t threads)) \
  KERNEL(linear_pack, void(const LinearForward&, const GemmPlan&, int64_t task)) \
  KERNEL(linear_forward, void(const LinearForward&, const GemmPlan&, int64_t task, void* scratch)) \
  KERNEL(linear_few_rows_plan, FewRowsPlan(const LinearForward&, int64_t threads)) \
  KERNEL(linear_few_rows, void(const LinearForward&, const FewRowsPlan&, int64_t task, void* scratch)) \
  KERNEL(activation_backward, void(const ActivationBackward&, int64_t task)) \
  KERNEL(outer_plan, GemmPlan(const OuterProduct&, int64_t first, int64_t threads)) \
  KERNEL(outer_pack, void(const OuterProduct&, int64_t first, const GemmPlan&, int64_t task, void* scratch)) \
  KERNEL(outer_run, void(const OuterProduct&, int64_t first, const GemmPlan&, int64_t task, void* scratch)) \
  KERNEL(column_sums, void(const ColumnSums&, int64_t task)) \
  KERNEL(add_layer_norm_scratch, size_t(int64_t width)) \
  KERNEL(add_layer_norm_forward, void(const AddLayerNorm&, int64_t task)) \
  KERNEL(add_layer_norm_backward, void(const AddLayerNormBackward&, int64_t task, void* scratch)) \
  KERNEL(qk_norm_rope_scratch, size_t(int64_t width)) \
  KERNEL(qk_norm_rope_forward, void(const QkNormRope&, int64_t task)) \
  KERNEL(qk_norm_rope_backward, void(const QkNormRope&, int64_t task, void* scratch))
// clang-format on
