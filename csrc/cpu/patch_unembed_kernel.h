// Patches back into images: the transposed convolution with stride = kernel.
//
//     images[b, c, patch (i, j)] = (tokens[b, n] @ W)[c, :, :] / std[c] + bias[c]
//
// One task owns a block of tokens and all pixels of their patches. It multiplies them with the
// packed weights into a block of patch rows in L2 (floats), then collects, line by line of the
// image, what patches side by side contribute, and writes whole stretches of the image once. Bytes
// moved: the tokens, the images, and the weights twice (packing).
#pragma once

#include "gemm_gather.h"
#include "gemm_kernel.h"
#include "patch_embed_gather.h"
#include "patch_unembed.h"

namespace patchgen_fast {
namespace {

// Floats from patch row to patch row of a task's block.
PATCHGEN_FAST_INLINE int64_t patch_row_pitch(const PatchGrid& g) {
  return block_stride(g.depth());
}

// A line collected from patches side by side, padded to whole vectors.
PATCHGEN_FAST_INLINE int64_t collected_length(const PatchGrid& g) {
  return round_up(g.grid_w * g.patch_w, kWordsPerLine);
}

template <class T>
static GemmPlan plan_patch_unembed(const PatchUnembed& u, int64_t threads) {
  const int64_t rows = u.grid.batch * u.grid.patches();
  const size_t row_bytes = static_cast<size_t>(patch_row_pitch(u.grid)) * sizeof(float);
  GemmPlan plan = plan_gemm<typename OperandFor<T>::type>(
      rows, u.grid.depth(), u.embed, threads, sizeof(RowTarget<float>) + row_bytes, true);
  plan.scratch_bytes += static_cast<size_t>(collected_length(u.grid)) * sizeof(float);
  return plan;
}

// A column is a pixel of a patch, and has its channel's bias.
template <class T>
static void pack_pixel_bias(float* to, const PatchUnembed& u, const GemmPlan& plan,
                            int64_t column) {
  const T* bias = static_cast<const T*>(u.bias);
  const int64_t pixels = plan.columns / u.grid.channels;
  for (int64_t i = 0; i < panel_vecs(plan, column) * kLanes; ++i) {
    const bool present = bias != nullptr && column + i < plan.columns;
    to[i] = present ? load_one(bias + (column + i) / pixels) : 0.0f;
  }
}

template <class T>
static void pack_patch_unembed(const PatchUnembed& u, const GemmPlan& plan, int64_t panel) {
  using Operand = typename OperandFor<T>::type;
  const int64_t column = panel_column(plan, panel);
  Word* packed = static_cast<Word*>(u.packed);
  pack_columns<Operand>(packed + panel_offset(plan, panel), plan, column, 0,
                        static_cast<const T*>(u.weight), plan.columns, plan.depth);
  float* bias = reinterpret_cast<float*>(packed + bias_offset(plan)) + column;
  pack_pixel_bias<T>(bias, u, plan, column);
}

// -- from patch rows to lines of the image --------------------------------------------------------

// The runs of `count` patches, side by side in the image; `from` is the run of the first.
template <int64_t Run>
PATCHGEN_FAST_INLINE void collect_runs(float* line, const float* from, int64_t pitch, int64_t run,
                                       int64_t count) {
  const int64_t length = Run > 0 ? Run : run;
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t i = 0; i < length; ++i) {
      line[p * length + i] = from[p * pitch + i];
    }
  }
}

static void collect(float* line, const float* from, int64_t pitch, int64_t run, int64_t count) {
  switch (run) {
    case 2:
      return collect_runs<2>(line, from, pitch, run, count);
    case 4:
      return collect_runs<4>(line, from, pitch, run, count);
    case 8:
      return collect_runs<8>(line, from, pitch, run, count);
    case 16:
      return collect_runs<16>(line, from, pitch, run, count);
    default:
      return collect_runs<0>(line, from, pitch, run, count);
  }
}

template <class Pixel>
PATCHGEN_FAST_INLINE void write_line(Pixel* to, const float* line, float scale, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_up_to(to + i, load(line + i) * scale, count - i);
  }
}

// `count` patches side by side, from rows `pitch` floats apart.
template <class Pixel>
static void paste_side_by_side(const PatchUnembed& u, Pixel* corner, const float* rows,
                               int64_t pitch, int64_t count, float* line) {
  const PatchGrid& g = u.grid;
  for (int64_t c = 0; c < g.channels; ++c) {
    const float scale = u.std != nullptr ? 1.0f / u.std[c] : 1.0f;
    for (int64_t t = 0; t < g.patch_t; ++t) {
      for (int64_t h = 0; h < g.patch_h; ++h, rows += g.patch_w) {
        collect(line, rows, pitch, g.patch_w, count);
        Pixel* to = corner + c * g.stride_c + t * g.stride_t + h * g.stride_h;
        write_line(to, line, scale, count * g.patch_w);
      }
    }
  }
}

template <class Pixel>
static void paste_patches(const PatchUnembed& u, const GemmTask& t, const float* rows,
                          float* line) {
  const PatchGrid& g = u.grid;
  const int64_t pitch = patch_row_pitch(g);
  Pixel* images = static_cast<Pixel*>(u.images);
  for (int64_t row = 0; row < t.rows;) {
    const PatchPosition at = patch_position(g, t.first_row + row);
    const int64_t count = smaller(g.grid_w - at.w, t.rows - row);
    paste_side_by_side(u, images + pixel_offset(g, at), rows + row * pitch, pitch, count, line);
    row += count;
  }
}

template <class T>
static void unembed_tokens(const PatchUnembed& u, const GemmPlan& plan, int64_t task,
                           void* scratch) {
  using Operand = typename OperandFor<T>::type;
  const GemmTask t = gemm_task(plan, task);
  const int64_t pitch = patch_row_pitch(u.grid);
  Word* a = static_cast<Word*>(scratch);
  float* rows = reinterpret_cast<float*>(a + plan.rows_per_task * plan.stride);
  float* line = rows + plan.rows_per_task * pitch;
  auto* targets = reinterpret_cast<RowTarget<float>*>(line + collected_length(u.grid));
  const RowsOf<T> tokens{static_cast<const T*>(u.tokens), u.embed, u.grid.patches(),
                         u.token_group_stride};
  gather_rows<Operand>(a, plan.stride, tokens, t.first_row, t.rows, plan.depth);
  for (int64_t r = 0; r < t.rows; ++r) {
    targets[r] = {rows + r * pitch, nullptr};
  }
  const Word* packed = static_cast<const Word*>(u.packed);
  const float* bias = reinterpret_cast<const float*>(packed + bias_offset(plan));
  multiply_block<Operand>(plan, t, a, packed, true,
                          RowSink<float>{targets, bias, plan.columns, false});
  for_float_type(u.image_dtype,
                 [&]<class Pixel>(Pixel) { paste_patches<Pixel>(u, t, rows, line); });
}

// -- the kernel table's entries -------------------------------------------------------------------

static GemmPlan patch_unembed_plan(const PatchUnembed& u, int64_t threads) {
  return for_float_type(u.dtype, [&]<class T>(T) { return plan_patch_unembed<T>(u, threads); });
}

static void patch_unembed_pack(const PatchUnembed& u, const GemmPlan& plan, int64_t task) {
  for_float_type(u.dtype, [&]<class T>(T) { pack_patch_unembed<T>(u, plan, task); });
}

static void patch_unembed_run(const PatchUnembed& u, const GemmPlan& plan, int64_t task,
                              void* scratch) {
  for_float_type(u.dtype, [&]<class T>(T) { unembed_tokens<T>(u, plan, task, scratch); });
}

}  // namespace
}  // namespace patchgen_fast
