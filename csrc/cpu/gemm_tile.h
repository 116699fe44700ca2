// The register tile of all matrix products: kTileRows rows of A times one panel of packed W.
//
//     acc[r][v] += A[r][k] * panel[k][v]        one 32-bit group k at a time
//
// A group is one float, or two bf16 where the machine multiplies pairs; so the loop is the same for
// both, and so is the layout: A row by row, a panel as [groups][kPanelColumns]. With 32 registers
// the tile is 8 x 3 vectors: per group 3 loads of W and 8 broadcasts of A feed 24 multiplications,
// enough independent sums to hide their latency. A stays in the L1 cache, the panel in L2 (8 bytes
// a multiplication), C is written once, by the sink, straight from the registers.
#pragma once

#include "register_tile.h"

namespace patchgen_fast {
namespace {

using Word = uint32_t;

constexpr int kTileRows = kRegisters == 32 ? 8 : 6;
constexpr int kTileVecs = kRegisters == 32 ? 3 : 2;
constexpr int64_t kPanelColumns = kTileVecs * kLanes;
constexpr int64_t kWordsPerLine = 16;

// How one group is multiplied. Long sums are cut into runs of kRun groups, or rounding errors grow
// with the depth faster than in a product that is blocked over the depth, as MKL's is (192).
struct FloatOperand : FloatMath {
  using Element = float;
  static constexpr int64_t kRun = 128;
};

struct PairOperand : PairMath {
  using Element = BFloat16;
  static constexpr int64_t kRun = 1024;
};

// Bytes, four to a group; multiplied by patch_embed_limbs_kernel.h.
struct ByteOperand {
  using Element = uint8_t;
  static constexpr int kGroup = 4;
};

// What a tensor of `Element` is multiplied as: pairs only where they are native.
template <class Element>
struct OperandFor {
  using type = FloatOperand;
};
template <>
struct OperandFor<uint8_t> {
  using type = ByteOperand;
};
#if defined(__AVX512BF16__)
template <>
struct OperandFor<BFloat16> {
  using type = PairOperand;
};
#endif

template <class Element>
constexpr bool kMultipliedAsStored =
    std::is_same_v<Element, typename OperandFor<Element>::type::Element>;

// body(Element{}) for the element type of `dtype`, one of the three float types.
template <class Body>
PATCHGEN_FAST_INLINE auto for_float_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::bfloat16:
      return body(BFloat16{});
    case Dtype::float16:
      return body(Float16{});
    default:
      return body(float{});
  }
}

PATCHGEN_FAST_INLINE Vec broadcast_word(const Word* word) {
  return broadcast(load_bits<float>(word));
}
PATCHGEN_FAST_INLINE Vec load_words(const Word* from) {
  return load_bits<Vec>(from);
}

// How many steps ahead the panel, too long to stay in the L1 cache, is brought there from L2.
constexpr int64_t kPanelAhead = 12;

// Steps between the lines of two rows that the sink fetches: more at once than a core has misses
// under way, and it drops some of them.
constexpr int64_t kStepsPerRow = 6;

// What is multiplied next, brought near from L3 or memory: a line is asked for at `at`, which moves
// `step` bytes on, with each group of each tile. Evenly, as a burst would wait for its misses.
struct Ahead {
  static constexpr bool kSomething = true;
  const char* at;
  int64_t step;

  PATCHGEN_FAST_INLINE_MEMBER void bring_next() {
    __builtin_prefetch(at);
    at += step;
  }
  PATCHGEN_FAST_INLINE_MEMBER void skip(int64_t groups) { at += groups * step; }
};

// In its place where that is in the cache already: short tiles show the difference.
struct NothingAhead {
  static constexpr bool kSomething = false;
  PATCHGEN_FAST_INLINE_MEMBER void bring_next() {}
  PATCHGEN_FAST_INLINE_MEMBER void skip(int64_t) {}
};

// Rows of A whose addresses are reckoned from one pointer: with all from one, and one more pointer
// for what is brought in, the compiler runs out of registers for the multiples of the stride.
constexpr int kRowsFromOne = 4;

PATCHGEN_FAST_INLINE void keep_in_register(const Word*& pointer) {
  asm("" : "+r"(pointer));
}

template <class Operand, int Rows, int Vecs, class Next>
PATCHGEN_FAST_INLINE void accumulate(Vec (&acc)[Rows][Vecs], const Word* a, int64_t stride,
                                     const Word* panel, int64_t groups, Next ahead) {
  constexpr int64_t kStep = Vecs * kLanes;
  constexpr bool kTwoPointers = Next::kSomething && Rows > kRowsFromOne;
  const Word* upper = a + kRowsFromOne * stride;
  for (int64_t k = 0; k < groups; ++k) {
    if constexpr (kTwoPointers) {
      keep_in_register(a);
      keep_in_register(upper);
    }
    Vec w[Vecs];
    ahead.bring_next();
#pragma GCC unroll 4
    for (int64_t i = 0; i < kStep; i += kWordsPerLine) {
      __builtin_prefetch(panel + (k + kPanelAhead) * kStep + i);
    }
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      w[v] = load_words(panel + k * kStep + v * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Word* row =
          kTwoPointers && r >= kRowsFromOne ? upper + (r - kRowsFromOne) * stride : a + r * stride;
      const Vec x = broadcast_word(kTwoPointers ? row : row + k);
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) {
        acc[r][v] = Operand::multiply_add(acc[r][v], x, w[v]);
      }
    }
    if constexpr (kTwoPointers) {
      ++a;
      ++upper;
    }
  }
}

// The same, while the sink fetches the lines of `expected` rows of the tile.
template <class Operand, int Rows, int Vecs, class Sink, class Next>
PATCHGEN_FAST_INLINE void accumulate_expecting(Vec (&acc)[Rows][Vecs], const Word* a,
                                               int64_t stride, const Word* panel, int64_t groups,
                                               const Sink& sink, int64_t row, int64_t column,
                                               int expected, Next ahead) {
  for (int r = 0; groups > 0; ++r) {
    int64_t steps = groups;
    if (r < expected) {
      sink.template expect<Vecs>(row + r, column);
      steps = smaller(groups, kStepsPerRow);
    }
    accumulate<Operand>(acc, a, stride, panel, steps, ahead);
    ahead.skip(kStepsPerRow);
    a += steps;
    panel += steps * Vecs * kLanes;
    groups -= steps;
  }
}

// One tile over the whole depth, handed to the sink. A long sum is made of runs that are added up
// in `total`, which stays in the L1 cache.
template <class Operand, int Rows, int Vecs, class Sink, class Next>
PATCHGEN_FAST_INLINE void gemm_tile(const Word* a, int64_t stride, const Word* panel,
                                    int64_t groups, const Sink& sink, int64_t row, int64_t column,
                                    Next ahead) {
  Vec acc[Rows][Vecs] = {};
  if (groups <= Operand::kRun) {
    accumulate_expecting<Operand>(acc, a, stride, panel, groups, sink, row, column, Rows, ahead);
  } else {
    Vec total[Rows][Vecs] = {};
    for (int64_t first = 0; first < groups; first += Operand::kRun) {
      const int64_t run = groups - first < Operand::kRun ? groups - first : Operand::kRun;
      accumulate_expecting<Operand>(acc, a + first, stride, panel + first * Vecs * kLanes, run,
                                    sink, row, column, first == 0 ? Rows : 0, ahead);
      ahead.skip(run);
      const bool last = first + run == groups;
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < Vecs; ++v) {
          const Vec sum = total[r][v] + acc[r][v];
          total[r][v] = sum;
          acc[r][v] = last ? sum : Vec{};
        }
      }
    }
  }
  sink.put(acc, row, column);
}

}  // namespace
}  // namespace patchgen_fast
