// Patch embedding: a strided convolution as one matrix product, from the image to the tokens.
//
//     out[b, P + n, :] = patch(b, n) @ W^T + bias + pos_embed[n],    out[b, :P, :] = prefix
//
// One task owns a block of patches (48 to 96) and all or some columns of their tokens. It gathers
// the patches into its block of A (L2), multiplies them with the packed weights, and the epilogue
// adds bias and position to the registers and writes each token once: nothing else passes through
// memory. Bytes moved: the images, the tokens, and the weights twice (packing).
#pragma once

#include "gemm_kernel.h"
#include "patch_embed_gather.h"
#include "patch_embed_limbs_kernel.h"

namespace patchgen_fast {
namespace {

#if defined(__AVX512VNNI__)
// bf16 weights are multiplied in pairs, which is as fast as two limbs, and they would need three.
template <class Weight>
constexpr bool kUsesLimbs = !std::is_same_v<Weight, BFloat16>;
#else
template <class Weight>
constexpr bool kUsesLimbs = false;
#endif

template <class Weight>
static GemmPlan plan_patch_embed(const PatchEmbedForward& f, int64_t threads) {
  using Operand = typename OperandFor<Weight>::type;
  if constexpr (kUsesLimbs<Weight>) {
    if (suits_limbs<Weight>(f)) {
      return plan_limbs<Weight>(f, threads);
    }
  }
  const PatchGrid& grid = f.source.grid;
  const int64_t rows = grid.batch * grid.patches();
  GemmPlan plan =
      plan_gemm<Operand>(rows, f.embed, grid.depth(), threads, sizeof(RowTarget<Weight>));
  plan.scratch_bytes += gather_scratch_bytes(grid);
  plan.pack_scratch_bytes =
      grid.interleaved ? static_cast<size_t>(kPanelColumns * plan.depth) * sizeof(Weight) : 0;
  return plan;
}

// Rows of W from [C, pixel] to [pixel, C], the order of an interleaved image.
template <class Weight>
static void interleave_rows(Weight* to, const Weight* w, int64_t rows, int64_t channels,
                            int64_t pixels) {
  for (int64_t r = 0; r < rows; ++r, to += channels * pixels, w += channels * pixels) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = 0; p < pixels; ++p) {
        to[p * channels + c] = w[c * pixels + p];
      }
    }
  }
}

template <class Weight>
static void pack_patch_embed(const PatchEmbedForward& f, const GemmPlan& plan, int64_t panel,
                             void* scratch) {
  using Operand = typename OperandFor<Weight>::type;
  if constexpr (kUsesLimbs<Weight>) {
    if (plan.limbs) {
      return pack_limbs<Weight>(f, plan, panel, scratch);
    }
  }
  const PatchGrid& grid = f.source.grid;
  const int64_t column = panel_column(plan, panel);
  const Weight* w = static_cast<const Weight*>(f.weight) + column * plan.depth;
  if (grid.interleaved) {
    Weight* permuted = static_cast<Weight*>(scratch);
    interleave_rows(permuted, w, smaller(plan.columns - column, kPanelColumns), grid.channels,
                    plan.depth / grid.channels);
    w = permuted;
  }
  Word* packed = static_cast<Word*>(f.packed);
  pack_rows<Operand>(packed + panel_offset(plan, panel), plan, column, w, plan.depth);
  pack_bias(reinterpret_cast<float*>(packed + bias_offset(plan)) + column, plan, column,
            static_cast<const Weight*>(f.bias));
}

// Where each token of a task goes, and its position; the prefix is written before an image's first.
template <class Weight>
static void place_tokens(const PatchEmbedForward& f, const GemmTask& t,
                         RowTarget<Weight>* targets) {
  const int64_t patches = f.source.grid.patches();
  const Weight* positions = static_cast<const Weight*>(f.pos_embed);
  for (int64_t row = 0; row < t.rows; ++row) {
    const int64_t image = (t.first_row + row) / patches;
    const int64_t patch = (t.first_row + row) % patches;
    const int64_t token = image * (f.prefix_tokens + patches) + f.prefix_tokens + patch;
    Weight* out = static_cast<Weight*>(f.out) + token * f.embed;
    targets[row] = {out, positions != nullptr ? positions + patch * f.embed : nullptr};
    if (patch == 0 && f.prefix_tokens > 0 && t.first_panel == 0) {
      const int64_t elements = f.prefix_tokens * f.embed;
      __builtin_memcpy(out - elements, f.prefix, static_cast<size_t>(elements) * sizeof(Weight));
    }
  }
}

template <class Weight>
static void embed_patches(const PatchEmbedForward& f, const GemmPlan& plan, int64_t task,
                          void* scratch) {
  using Operand = typename OperandFor<Weight>::type;
  const GemmTask t = gemm_task(plan, task);
  Word* a = static_cast<Word*>(scratch);
  auto* targets = reinterpret_cast<RowTarget<Weight>*>(a + plan.rows_per_task * plan.stride);
  void* lines = targets + plan.rows_per_task;
  place_tokens(f, t, targets);
  if constexpr (kUsesLimbs<Weight>) {
    if (plan.limbs) {
      return embed_limbs(f, plan, t, a, lines, targets);
    }
  }
  gather_patches<Weight>(f.source, t.first_row, t.rows, a, plan.stride, lines);
  const Word* packed = static_cast<const Word*>(f.packed);
  const float* bias = reinterpret_cast<const float*>(packed + bias_offset(plan));
  const RowSink<Weight> sink{targets, bias, f.embed, f.pos_embed != nullptr};
  multiply_block<Operand>(plan, t, a, packed, true, sink);
}

// -- the kernel table's entries -------------------------------------------------------------------

static GemmPlan patch_embed_plan(const PatchEmbedForward& f, int64_t threads) {
  return for_float_type(f.dtype, [&]<class T>(T) { return plan_patch_embed<T>(f, threads); });
}

static void patch_embed_pack(const PatchEmbedForward& f, const GemmPlan& plan, int64_t task,
                             void* scratch) {
  for_float_type(f.dtype, [&]<class T>(T) { pack_patch_embed<T>(f, plan, task, scratch); });
}

static void patch_embed_forward(const PatchEmbedForward& f, const GemmPlan& plan, int64_t task,
                                void* scratch) {
  for_float_type(f.dtype, [&]<class T>(T) { embed_patches<T>(f, plan, task, scratch); });
}

}  // namespace
}  // namespace patchgen_fast
