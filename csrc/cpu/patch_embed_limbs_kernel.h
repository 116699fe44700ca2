// Patch embedding of uint8 images by integer dot products, as accurate as floats.
//
//     out = scale * (limb_0 + 2^8 limb_1 + 2^16 limb_2) + bias
//     limb_l = sum over k of (u[k] - centre[k]) * q_l[k],    W / (255 std) = scale * (q_0 + 2^8 q_1
//     + ...)
//
// The pixels stay bytes. The weights take the normalisation and are cut, row by row, into three
// signed 8-bit limbs: 24 bits below the row's largest weight, as fine as the float's own. Products
// and sums are exact integers; where the mean is not 0 they start from -sum(centre * q), centre the
// mean's nearest integer, so that nothing cancels later, and the remainder of the mean is in the
// bias. Three dot products of four bytes cost 3/4 of the four multiplications of floats, and a
// block of A is a quarter of its size.
//
// The tile is 8 rows x 16 columns x 3 limbs. One pack task makes 48 columns; what is said in
// patch_embed_kernel.h of tasks and memory holds here too.
#pragma once

#include "gemm_kernel.h"
#include "patch_embed_gather.h"

namespace patchgen_fast {
namespace {

#if defined(__AVX512VNNI__)

constexpr int kLimbs = 3;
constexpr float kLargestQuotient =
    8355000.0f;  // 127 * (2^16 + 2^8 + 1), less a margin for rounding
// A row whose largest weight stands out further than this from its root mean square would lose
// accuracy against floats, which have an exponent for each weight.
constexpr float kMostPeaked = 10.0f;
constexpr int64_t kLongestByteDepth = 65000;  // 255 * 128 * depth stays below 2^31

// acc += the sum of 4 products of unsigned by signed bytes, lane by lane. (In assembly since GCC 12
// copies the accumulators of the intrinsic to and fro, at half the speed.)
PATCHGEN_FAST_INLINE void dot_bytes(VecInt& acc, VecInt unsigned_bytes, VecInt signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// Parts of the packed space, in words: limbs; then for each column scale, bias, and the sums'
// starting values.
struct LimbSpace {
  Word* limbs;
  float* scale;
  float* bias;
  int32_t* start;  // [kLimbs][columns]
  int64_t columns;

  LimbSpace(void* packed, const GemmPlan& plan) : columns(plan.panels * kPanelColumns) {
    limbs = static_cast<Word*>(packed);
    scale = reinterpret_cast<float*>(limbs + kLimbs * columns * plan.groups);
    bias = scale + columns;
    start = reinterpret_cast<int32_t*>(bias + columns);
  }

  static size_t bytes(const GemmPlan& plan) {
    const int64_t columns = plan.panels * kPanelColumns;
    return static_cast<size_t>(columns * (kLimbs * plan.groups + 2 + kLimbs)) * sizeof(Word);
  }

  // The limbs of kLanes columns from `column` on: [groups][kLimbs][kLanes].
  Word* strip(const GemmPlan& plan, int64_t column) const {
    return limbs + column * kLimbs * plan.groups;
  }
};

// What normalises each element of a row of W, in the order in which images are read.
struct PixelScales {
  float* scale;      // 1 / (255 std)
  float* centre;     // an integer
  float* remainder;  // centre - 255 mean

  PixelScales(float* space, int64_t pitch)
      : scale(space), centre(space + pitch), remainder(space + 2 * pitch) {}

  void fill(const PatchSource& source, int64_t depth) const {
    const PatchGrid& g = source.grid;
    const int64_t pixels = depth / g.channels;
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t c = g.interleaved ? k % g.channels : k / pixels;
      const float mean = source.mean != nullptr ? 255.0f * source.mean[c] : 0.0f;
      scale[k] = 1.0f / (255.0f * (source.std != nullptr ? source.std[c] : 1.0f));
      centre[k] = static_cast<float>(static_cast<int32_t>(mean + (mean < 0 ? -0.5f : 0.5f)));
      remainder[k] = centre[k] - mean;
    }
  }
};

template <class Weight>
static bool is_flat(const Weight* row, int64_t depth) {
  Vec largest{}, squares{};
  for (int64_t k = 0; k < depth; k += kLanes) {
    const Vec w = load_up_to(row + k, depth - k);
    largest = max(largest, max(w, -w));
    squares = fma(w, w, squares);
  }
  const float most = max_lanes(largest);
  const float mean_square = sum_lanes(squares) / static_cast<float>(depth);
  return most * most <= kMostPeaked * kMostPeaked * mean_square && mean_square < 1e30f;
}

// Whether limbs are as accurate as floats here. Reads all weights once, which fetches them. For
// fewer columns than lanes there is nothing to gain, and too few results for the limbs' rounding,
// which is that of the row's largest weight, to average out.
template <class Weight>
static bool suits_limbs(const PatchEmbedForward& f) {
  const int64_t depth = f.source.grid.depth();
  if (f.source.dtype != Dtype::uint8 || depth > kLongestByteDepth || f.embed < kLanes) {
    return false;
  }
  const Weight* w = static_cast<const Weight*>(f.weight);
  for (int64_t row = 0; row < f.embed; ++row) {
    if (!is_flat(w + row * depth, depth)) {
      return false;
    }
  }
  return true;
}

// Space of a pack task, in floats: the scales; a row of W; and the bytes of kLanes rows.
PATCHGEN_FAST_INLINE int64_t limb_row_words(const GemmPlan& plan) {
  return round_up(plan.groups, kLanes);
}

template <class Weight>
static GemmPlan plan_limbs(const PatchEmbedForward& f, int64_t threads) {
  const PatchGrid& grid = f.source.grid;
  GemmPlan plan = plan_gemm<ByteOperand>(grid.batch * grid.patches(), f.embed, grid.depth(),
                                         threads, sizeof(RowTarget<Weight>));
  plan.limbs = true;
  plan.packed_bytes = LimbSpace::bytes(plan);
  plan.rows_at_once = plan.packed_bytes <= static_cast<size_t>(kStayingBytes) ? kTileRows : 0;
  plan.scratch_bytes += gather_scratch_bytes(grid);
  const int64_t pitch = round_up(plan.depth, kLanes);
  plan.pack_scratch_bytes =
      static_cast<size_t>(4 * pitch + kLimbs * kLanes * limb_row_words(plan)) * sizeof(float);
  return plan;
}

// -- packing --------------------------------------------------------------------------------------

// A row of W as floats, normalised, in the order in which images are read; zeros to a whole vector.
template <class Weight>
static float normalise_weights(float* to, const Weight* w, const PatchGrid& g, int64_t depth,
                               const PixelScales& scales) {
  const int64_t step = g.interleaved ? g.channels : 1;  // from element to element of one channel
  const int64_t pixels = depth / g.channels;
  if (step == 1) {
    for (int64_t k = 0; k < depth; k += kLanes) {
      store(to + k, load_up_to(w + k, depth - k));
    }
  } else {
    for (int64_t k = depth; k < round_up(depth, kLanes); ++k) {
      to[k] = 0.0f;
    }
    for (int64_t c = 0; c < g.channels; ++c) {
      for (int64_t p = 0; p < pixels; ++p) {
        to[p * step + c] = load_one(w + c * pixels + p);
      }
    }
  }
  Vec largest{};
  for (int64_t k = 0; k < depth; k += kLanes) {
    const Vec x = load(to + k) * load_up_to(scales.scale + k, depth - k);
    store(to + k, x);
    largest = max(largest, max(x, -x));
  }
  return max_lanes(largest);
}

struct LimbSums {
  VecInt limb[kLimbs];
  Vec remainder;
};

// The lowest 8 bits as a signed number; what is left is divided by 2^8.
PATCHGEN_FAST_INLINE VecInt take_limb(VecInt& quotient) {
  const VecInt limb = (quotient << 24) >> 24;
  quotient = (quotient - limb) >> 8;
  return limb;
}

// Cuts a normalised row into bytes, kLimbs rows `row_bytes` apart.
static LimbSums cut_row(uint8_t* to, int64_t row_bytes, const float* row, int64_t depth,
                        float inverse, const PixelScales& scales) {
  LimbSums sums{};
  for (int64_t k = 0; k < depth; k += kLanes) {
    const Vec w = load(row + k);
    const Vec remainder = load_up_to(scales.remainder + k, depth - k);
    const VecInt centre = convert_lanes<VecInt>(load_up_to(scales.centre + k, depth - k));
    VecInt quotient = bit_cast<VecInt>(_mm512_cvtps_epi32(w * inverse));
    sums.remainder = fma(w, remainder, sums.remainder);
    for (int l = 0; l < kLimbs; ++l) {
      const VecInt limb = take_limb(quotient);
      sums.limb[l] += limb * centre;
      store_bits(to + l * row_bytes + k, convert_lanes<Byte>(limb));
    }
  }
  return sums;
}

PATCHGEN_FAST_INLINE int32_t sum_lanes(VecInt v) {
  return _mm512_reduce_add_epi32(bit_cast<__m512i>(v));
}

// kLanes columns from `column` on, from bytes [kLimbs][kLanes] rows of `row_words` words.
static void pack_strip(Word* strip, const Word* bytes, int64_t row_words, int64_t groups) {
  for (int l = 0; l < kLimbs; ++l) {
    for (int64_t k = 0; k < groups; k += kLanes) {
      Vec tile[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        tile[r] = load_words(bytes + (l * kLanes + r) * row_words + k);
      }
      transpose(tile);
      for (int i = 0; i < kLanes && k + i < groups; ++i) {
        store_bits(strip + ((k + i) * kLimbs + l) * kLanes, tile[i]);
      }
    }
  }
}

// One column of C, row `column` of W: its limbs to `bytes`, and what belongs to the column.
template <class Weight>
static void pack_limb_row(const PatchEmbedForward& f, const GemmPlan& plan, int64_t column,
                          const PixelScales& scales, float* row, uint8_t* bytes,
                          const LimbSpace& space) {
  const int64_t row_bytes = limb_row_words(plan) * kLanes * static_cast<int64_t>(sizeof(Word));
  const Weight* w = static_cast<const Weight*>(f.weight) + column * plan.depth;
  const Weight* bias = static_cast<const Weight*>(f.bias);
  const float largest = normalise_weights(row, w, f.source.grid, plan.depth, scales);
  const float inverse = largest > 0 ? kLargestQuotient / largest : 0.0f;
  const LimbSums sums = cut_row(bytes, row_bytes, row, plan.depth, inverse, scales);
  for (int l = 0; l < kLimbs; ++l) {
    space.start[l * space.columns + column] = -sum_lanes(sums.limb[l]);
  }
  space.scale[column] = largest / kLargestQuotient;
  space.bias[column] =
      sum_lanes(sums.remainder) + (bias != nullptr ? load_one(bias + column) : 0.0f);
}

template <class Weight>
static void pack_limbs(const PatchEmbedForward& f, const GemmPlan& plan, int64_t panel,
                       void* scratch) {
  const int64_t pitch = round_up(plan.depth, kLanes);
  float* floats = static_cast<float*>(scratch);
  const PixelScales scales(floats, pitch);
  float* row = floats + 3 * pitch;
  Word* bytes = reinterpret_cast<Word*>(row + pitch);
  const int64_t row_words = limb_row_words(plan);
  const LimbSpace space(f.packed, plan);
  scales.fill(f.source, plan.depth);
  for (int64_t v = 0; v < kTileVecs; ++v) {
    const int64_t first = panel * kPanelColumns + v * kLanes;
    __builtin_memset(bytes, 0, static_cast<size_t>(kLimbs * kLanes * row_words) * sizeof(Word));
    for (int64_t r = 0; r < kLanes; ++r) {
      if (first + r < plan.columns) {
        uint8_t* row_bytes = reinterpret_cast<uint8_t*>(bytes + r * row_words);
        pack_limb_row<Weight>(f, plan, first + r, scales, row, row_bytes, space);
      } else {
        space.scale[first + r] = space.bias[first + r] = 0.0f;
        for (int l = 0; l < kLimbs; ++l) {
          space.start[l * space.columns + first + r] = 0;
        }
      }
    }
    pack_strip(space.strip(plan, first), bytes, row_words, plan.groups);
  }
}

// -- multiplying ----------------------------------------------------------------------------------

template <int Rows, class Sink>
PATCHGEN_FAST_INLINE void limb_tile(const GemmPlan& plan, const Word* a, const LimbSpace& space,
                                    int64_t column, const Sink& sink, int64_t row) {
  for (int r = 0; r < Rows; ++r) {
    sink.template expect<1>(row + r, column);
  }
  VecInt acc[Rows][kLimbs];
#pragma GCC unroll 4
  for (int l = 0; l < kLimbs; ++l) {
    const VecInt start = load_bits<VecInt>(space.start + l * space.columns + column);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      acc[r][l] = start;
    }
  }
  const Word* strip = space.strip(plan, column);
  for (int64_t k = 0; k < plan.groups; ++k) {
    VecInt w[kLimbs];
#pragma GCC unroll 4
    for (int l = 0; l < kLimbs; ++l) {
      w[l] = load_bits<VecInt>(strip + (k * kLimbs + l) * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const VecInt u = broadcast_int(static_cast<int32_t>(a[r * plan.stride + k]));
#pragma GCC unroll 4
      for (int l = 0; l < kLimbs; ++l) {
        dot_bytes(acc[r][l], u, w[l]);
      }
    }
  }
  const Vec scale = load(space.scale + column);
  Vec sum[Rows][1];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const Vec low =
        fma(convert_lanes<Vec>(acc[r][1]), broadcast(256.0f), convert_lanes<Vec>(acc[r][0]));
    sum[r][0] = fma(convert_lanes<Vec>(acc[r][2]), broadcast(65536.0f), low) * scale;
  }
  sink.put(sum, row, column);
}

template <class Sink, int Rows = kTileRows>
PATCHGEN_FAST_INLINE void multiply_limb_rows(const GemmPlan& plan, const Word* a, int64_t row,
                                             int64_t rows, const LimbSpace& space, int64_t column,
                                             const Sink& sink) {
  for (; rows >= Rows; rows -= Rows, row += Rows) {
    limb_tile<Rows>(plan, a + row * plan.stride, space, column, sink, row);
  }
  if constexpr (Rows > 1) {
    if (rows > 0) {
      multiply_limb_rows<Sink, Rows / 2>(plan, a, row, rows, space, column, sink);
    }
  }
}

// As multiply_block: the gathered bytes of task `t` against its columns.
template <class Sink>
static void multiply_limbs(const GemmPlan& plan, const GemmTask& t, const Word* a,
                           const LimbSpace& space, const Sink& sink) {
  const int64_t step = plan.rows_at_once > 0 ? plan.rows_at_once : t.rows;
  const int64_t first = t.first_panel * kPanelColumns;
  const int64_t last = smaller(plan.columns, first + t.panels * kPanelColumns);
  for (int64_t row = 0; row < t.rows; row += step) {
    for (int64_t column = first; column < last; column += kLanes) {
      multiply_limb_rows(plan, a, row, smaller(t.rows - row, step), space, column, sink);
    }
  }
}

// A task, from its tokens' places on: `a` is its block, `lines` the gather's space.
template <class Weight>
static void embed_limbs(const PatchEmbedForward& f, const GemmPlan& plan, const GemmTask& t,
                        Word* a, void* lines, const RowTarget<Weight>* targets) {
  gather_patches_of<uint8_t, uint8_t>(f.source, t.first_row, t.rows, a, plan.stride, lines);
  const LimbSpace space(f.packed, plan);
  const RowSink<Weight> sink{targets, space.bias, f.embed, f.pos_embed != nullptr};
  multiply_limbs(plan, t, a, space, sink);
}

#endif

}  // namespace
}  // namespace patchgen_fast
