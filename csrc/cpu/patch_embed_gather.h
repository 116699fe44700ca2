// Patches straight from the image into rows of a block of A: no patch tensor in memory.
//
//     A[row][k] = round((float(pixel) / (255 if uint8) - mean[c]) / std[c])
//
// Patches side by side share lines of the image. A line (the pixels of one grid row's patches, one
// image row, one channel or all channels interleaved) is read once, as a stream, converted into a
// buffer in L1 where its dtype or a normalisation asks for it, then dealt out: a run of pixels to
// each patch. Bytes moved: every pixel read once, every element of A written once.
#pragma once

#include <type_traits>

#include "gemm_pack.h"
#include "patch_embed.h"

namespace patchgen_fast {
namespace {

// Elements that one line gives to one patch.
PATCHGEN_FAST_INLINE int64_t run_length(const PatchGrid& g) {
  return g.patch_w * (g.interleaved ? g.channels : 1);
}

// A line's buffers: as it stands in the image, converted, and the scale and shift of each element
// of an interleaved line. Each is padded to whole vectors.
PATCHGEN_FAST_INLINE size_t line_buffer_bytes(const PatchGrid& g) {
  return static_cast<size_t>(round_up(g.grid_w * run_length(g), 16)) * sizeof(float);
}

PATCHGEN_FAST_INLINE size_t gather_scratch_bytes(const PatchGrid& g) {
  return 4 * line_buffer_bytes(g);
}

template <class Weight>
PATCHGEN_FAST_INLINE Vec round_as(Vec x) {
  if constexpr (std::is_same_v<Weight, BFloat16>) {
    return from_bf16(to_bf16(x));
  } else if constexpr (std::is_same_v<Weight, Float16>) {
    return from_fp16(to_fp16(x));
  } else {
    return x;
  }
}

// Reads lines of an image of `Pixel`s as elements of A, rounded to `Weight`.
template <class Pixel, class Weight>
class LineReader {
 public:
  using Element = typename OperandFor<Weight>::type::Element;

  LineReader(const PatchSource& source, void* scratch)
      : grid_(source.grid), mean_(source.mean), std_(source.std) {
    const PatchGrid& grid = source.grid;
    const size_t bytes = line_buffer_bytes(grid);
    char* buffers = static_cast<char*>(scratch);
    strided_ = reinterpret_cast<Pixel*>(buffers);
    converted_ = reinterpret_cast<Element*>(buffers + bytes);
    scales_ = reinterpret_cast<float*>(buffers + 2 * bytes);
    shifts_ = reinterpret_cast<float*>(buffers + 3 * bytes);
    if (grid.interleaved) {
      for (int64_t i = 0; i < grid.grid_w * run_length(grid); ++i) {
        scales_[i] = scale(i % grid.channels);
        shifts_[i] = shift(i % grid.channels);
      }
    }
  }

  // `count` elements from `line` on, of channel `c` or, if interleaved, of all channels.
  const Element* read(const Pixel* line, int64_t c, int64_t count) const {
    if (!grid_.interleaved && grid_.stride_w != 1) {
      for (int64_t i = 0; i < count; ++i) {
        strided_[i] = line[i * grid_.stride_w];
      }
      line = strided_;
    }
    if constexpr (std::is_same_v<Element, uint8_t>) {
      return line;  // bytes stay bytes: the weights are normalised instead
    } else if (kIsByte || mean_ != nullptr || std_ != nullptr) {
      return grid_.interleaved ? normalise_interleaved(line, count) : normalise(line, c, count);
    } else {
      return convert(line, count);
    }
  }

 private:
  static constexpr bool kIsByte = std::is_same_v<Pixel, uint8_t>;

  // x * scale + shift is (x / range - mean) / std.
  float scale(int64_t c) const {
    return 1.0f / ((kIsByte ? 255.0f : 1.0f) * (std_ != nullptr ? std_[c] : 1.0f));
  }
  float shift(int64_t c) const {
    return -(mean_ != nullptr ? mean_[c] : 0.0f) / (std_ != nullptr ? std_[c] : 1.0f);
  }

  template <class Change>
  PATCHGEN_FAST_INLINE const Element* change(Element* to, const Pixel* line, int64_t count,
                                             const Change& change_vector) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec x = load_up_to(line + i, count - i);
      store(to + i, round_as<Weight>(change_vector(x, i)));
    }
    return to;
  }

  const Element* convert(const Pixel* line, int64_t count) const {
    if constexpr (std::is_same_v<Pixel, Element>) {
      return line;
    } else {
      return change(converted_, line, count, [](Vec x, int64_t) { return x; });
    }
  }

  const Element* normalise(const Pixel* line, int64_t c, int64_t count) const {
    const Vec by = broadcast(scale(c));
    const Vec plus = broadcast(shift(c));
    return change(converted_, line, count, [&](Vec x, int64_t) { return fma(x, by, plus); });
  }

  const Element* normalise_interleaved(const Pixel* line, int64_t count) const {
    return change(converted_, line, count,
                  [&](Vec x, int64_t i) { return fma(x, load(scales_ + i), load(shifts_ + i)); });
  }

  const PatchGrid& grid_;
  const float* mean_;
  const float* std_;
  Pixel* strided_;
  Element* converted_;
  float* scales_;
  float* shifts_;
};

// -- dealing a line out ---------------------------------------------------------------------------

template <int64_t Bytes>
PATCHGEN_FAST_INLINE void deal_runs(char* to, int64_t stride, const char* line, int64_t patches) {
  for (int64_t p = 0; p < patches; ++p) {
    __builtin_memcpy(to + p * stride, line + p * Bytes, Bytes);
  }
}

// Any length from `Piece` on: whole pieces, the last one overlapping its neighbour.
template <int64_t Piece>
PATCHGEN_FAST_INLINE void deal_pieces(char* to, int64_t stride, const char* line, int64_t patches,
                                      int64_t bytes) {
  for (int64_t p = 0; p < patches; ++p) {
    for (int64_t i = 0; i + Piece < bytes; i += Piece) {
      __builtin_memcpy(to + p * stride + i, line + p * bytes + i, Piece);
    }
    __builtin_memcpy(to + p * stride + bytes - Piece, line + (p + 1) * bytes - Piece, Piece);
  }
}

PATCHGEN_FAST_INLINE void deal_any(char* to, int64_t stride, const char* line, int64_t patches,
                                   int64_t bytes) {
  if (bytes >= 16) {
    deal_pieces<16>(to, stride, line, patches, bytes);
  } else if (bytes >= 8) {
    deal_pieces<8>(to, stride, line, patches, bytes);
  } else if (bytes >= 4) {
    deal_pieces<4>(to, stride, line, patches, bytes);
  } else {
    deal_pieces<1>(to, stride, line, patches, bytes);
  }
}

// The run of each of `patches` patches from a line to rows of A, `stride` bytes apart.
static void deal(char* to, int64_t stride, const char* line, int64_t patches, int64_t bytes) {
  switch (bytes) {
    case 4:
      return deal_runs<4>(to, stride, line, patches);
    case 8:
      return deal_runs<8>(to, stride, line, patches);
    case 16:
      return deal_runs<16>(to, stride, line, patches);
    case 28:
      return deal_runs<28>(to, stride, line, patches);
    case 32:
      return deal_runs<32>(to, stride, line, patches);
    case 56:
      return deal_runs<56>(to, stride, line, patches);
    case 64:
      return deal_runs<64>(to, stride, line, patches);
    default:
      return deal_any(to, stride, line, patches, bytes);
  }
}

// -- blocks of patches ----------------------------------------------------------------------------

// Where a patch lies: patches are counted image by image, then time, row, column of the grid.
struct PatchPosition {
  int64_t image, t, h, w;
};

PATCHGEN_FAST_INLINE PatchPosition patch_position(const PatchGrid& g, int64_t patch) {
  PatchPosition at;
  at.w = patch % g.grid_w;
  patch /= g.grid_w;
  at.h = patch % g.grid_h;
  patch /= g.grid_h;
  at.t = patch % g.grid_t;
  at.image = patch / g.grid_t;
  return at;
}

// Element offset of the first pixel of a patch.
PATCHGEN_FAST_INLINE int64_t pixel_offset(const PatchGrid& g, const PatchPosition& at) {
  return at.image * g.stride_b + at.t * g.patch_t * g.stride_t + at.h * g.patch_h * g.stride_h +
         at.w * g.patch_w * g.stride_w;
}

// Asks for `bytes` from `from` on, which may lie outside the image: prefetching never faults.
PATCHGEN_FAST_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + i);
  }
}

// `count` patches side by side, the first with its corner at `corner`, into rows from `to` on;
// `next` is the corner of the patches that follow. Images come from L3 or DRAM in short lines,
// which the hardware's prefetchers see too late: each line asks for the one a channel (or a
// segment) later.
template <class Pixel, class Weight>
static void gather_side_by_side(const LineReader<Pixel, Weight>& reader, const PatchGrid& g,
                                const Pixel* corner, const Pixel* next, int64_t count, char* to,
                                int64_t stride) {
  using Element = typename LineReader<Pixel, Weight>::Element;
  const int64_t run = run_length(g);
  const int64_t run_bytes = run * static_cast<int64_t>(sizeof(Element));
  const int64_t line_bytes = count * run * static_cast<int64_t>(sizeof(Pixel));
  const int64_t channels = g.interleaved ? 1 : g.channels;
  for (int64_t c = 0; c < channels; ++c) {
    const Pixel* plane = corner + c * g.stride_c;
    const Pixel* next_plane = c + 1 < channels ? plane + g.stride_c : next;
    for (int64_t t = 0; t < g.patch_t; ++t) {
      for (int64_t h = 0; h < g.patch_h; ++h) {
        const int64_t line = t * g.stride_t + h * g.stride_h;
        prefetch(next_plane + line, line_bytes);
        const Element* elements = reader.read(plane + line, c, count * run);
        deal(to, stride, reinterpret_cast<const char*>(elements), count, run_bytes);
        to += run_bytes;
      }
    }
  }
}

// Patches [first, first + rows) into rows of `a`, `stride` words apart. Where the depth does not
// fill its last group, the rest of the group is 0.
template <class Pixel, class Weight>
static void gather_patches_of(const PatchSource& source, int64_t first, int64_t rows, Word* a,
                              int64_t stride, void* scratch) {
  const LineReader<Pixel, Weight> reader(source, scratch);
  const PatchGrid& g = source.grid;
  const Pixel* images = static_cast<const Pixel*>(source.images);
  using Operand = typename OperandFor<Weight>::type;
  if (g.depth() % Operand::kGroup != 0) {
    for (int64_t row = 0; row < rows; ++row) {
      a[row * stride + g.depth() / Operand::kGroup] = 0;
    }
  }
  for (int64_t row = 0; row < rows;) {
    const PatchPosition at = patch_position(g, first + row);
    const int64_t count = smaller(g.grid_w - at.w, rows - row);
    const int64_t following = smaller(first + row + count, g.batch * g.patches() - 1);
    gather_side_by_side(reader, g, images + pixel_offset(g, at),
                        images + pixel_offset(g, patch_position(g, following)), count,
                        reinterpret_cast<char*>(a + row * stride),
                        stride * static_cast<int64_t>(sizeof(Word)));
    row += count;
  }
}

template <class Weight>
static void gather_patches(const PatchSource& source, int64_t first, int64_t rows, Word* a,
                           int64_t stride, void* scratch) {
  switch (source.dtype) {
    case Dtype::uint8:
      return gather_patches_of<uint8_t, Weight>(source, first, rows, a, stride, scratch);
    case Dtype::bfloat16:
      return gather_patches_of<BFloat16, Weight>(source, first, rows, a, stride, scratch);
    case Dtype::float16:
      return gather_patches_of<Float16, Weight>(source, first, rows, a, stride, scratch);
    default:
      return gather_patches_of<float, Weight>(source, first, rows, a, stride, scratch);
  }
}

}  // namespace
}  // namespace patchgen_fast
