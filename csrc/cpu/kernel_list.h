// Every kernel that is compiled once per instruction set: KERNEL(name, signature). A new kernel is
// one line here, the header of its arguments, and the header of its code in kernels_isa.h.
#pragma once

#include "attention.h"
#include "patch_embed.h"

// clang-format off
#define PATCHGEN_FAST_KERNELS(KERNEL) \
  KERNEL(attention_plan, AttentionPlan(const AttentionForward&, int64_t threads)) \
  KERNEL(attention_forward, void(const AttentionForward&, const AttentionPlan&, int64_t task, void* scratch)) \
  KERNEL(patch_embed_plan, GemmPlan(const PatchEmbedForward&, int64_t threads)) \
  KERNEL(patch_embed_pack, void(const PatchEmbedForward&, const GemmPlan&, int64_t task, void* scratch)) \
  KERNEL(patch_embed_forward, void(const PatchEmbedForward&, const GemmPlan&, int64_t task, void* scratch))
// clang-format on
