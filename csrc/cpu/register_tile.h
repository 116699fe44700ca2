// Products of small matrices whose result stays in registers: c[rows][vectors] = a @ b.
//
// `a` is read one 32-bit unit at a time and broadcast, `b` one vector at a time:
//
//     a [rows][steps]             units, at any stride of either
//     b [steps][vectors][kLanes]  units, one step every b_step
//     c [rows][vectors * kLanes]  floats
//
// Where at most half the lanes of the last vector are in use, only that half is multiplied, at half
// the cost on machines that take a wide vector in two halves (Zen 4); the other lanes become 0.
//
// A unit is one float (FloatMath) or a pair of bf16 numbers that are neighbours in the contraction
// (PairMath); both are carried as the bits of a float. One tile holds rows x vectors accumulators:
// 8 x 3, 6 x 4 or 5 x 5 of 32 registers, 6 x 2 or 4 x 3 of 16; per step it loads vectors + rows
// units for rows * vectors multiplications, which keeps the multipliers busy from the first-level
// cache. A tile with fewer rows or vectors exists for each remainder, so no product is wasted.
#pragma once

#include <type_traits>

#include "integers.h"
#include "prefetch.h"
#include "simd.h"

namespace patchgen_fast {
namespace {

struct FloatMath {
  static constexpr int kGroup = 1;      // numbers in one unit
  static constexpr int kExpDegree = 5;  // of the polynomial that gives them, where they are weights
  PATCHGEN_FAST_INLINE Vec multiply_add(Vec acc, Vec a, Vec b) { return fma(a, b, acc); }
  PATCHGEN_FAST_INLINE NarrowVec multiply_add(NarrowVec acc, NarrowVec a, NarrowVec b) {
    return a * b + acc;
  }
};

struct PairMath {
  static constexpr int kGroup = 2;
  static constexpr int kExpDegree = 3;
  PATCHGEN_FAST_INLINE Vec multiply_add(Vec acc, Vec a, Vec b) {
    return dot_pairs(acc, bit_cast<Pairs>(a), bit_cast<Pairs>(b));
  }
  PATCHGEN_FAST_INLINE NarrowVec multiply_add(NarrowVec acc, NarrowVec a, NarrowVec b) {
    return dot_pairs(acc, a, b);
  }
};

// How bf16 operands are multiplied.
using Bf16Math = std::conditional_t<kHasBf16Dot, PairMath, FloatMath>;

// Steps summed in one run where float32 accuracy is at stake. One run of 64 saves attention a
// fiftieth of its time over two of 32; at D64 its mean error is then 1.14 times that of eager
// PyTorch, not 0.95 times.
constexpr int64_t kRun = 64;
// With few rows the products wait for memory anyway, and what they are measured against (a
// matrix-vector product) sums lane by lane.
constexpr int64_t kFewRows = 4;
constexpr int64_t kShortRun = 8;
constexpr int kMaxVectors = kRegisters == 32 ? 5 : 3;

constexpr int max_rows(int vectors) {
  constexpr int wide[] = {8, 8, 8, 6, 5};
  constexpr int narrow[] = {8, 6, 4};
  return kRegisters == 32 ? wide[vectors - 1] : narrow[vectors - 1];
}

// Vectors of the next tile when `remaining` are left: never leaves a narrow one behind.
constexpr int64_t tile_vectors(int64_t remaining) {
  constexpr int64_t preferred = kMaxVectors - (kMaxVectors > 3 ? 1 : 0);
  if (remaining <= kMaxVectors) {
    return remaining;
  }
  return remaining == preferred + 1 || remaining == preferred + 2 ? (remaining + 1) / 2 : preferred;
}

// The same where lanes are keys. Those products are short for pairs, and what a tile spends around
// its steps grows with its sums: over 32 steps, tiles of 8 x 2 reach 98 % of peak, of 6 x 4 93 %
// (Zen 5). Floats take twice the steps, and are 1 % faster in wide tiles.
template <class Math>
constexpr int64_t key_tile_vectors(int64_t remaining) {
  if (kRegisters < 32 || Math::kGroup == 1) {
    return tile_vectors(remaining);
  }
  return remaining <= 3 ? remaining : 2;
}

// The operand that is read unit by unit; strides count units. A transposed one has row 1.
struct Units {
  const float* data;
  int64_t row;
  int64_t step = 1;

  Units at(int64_t r, int64_t s) const { return {data + r * row + s * step, row, step}; }
};

// The operand that is read vector by vector: `count` of them a step.
struct Vectors {
  const float* data;
  int64_t step;
  int64_t count;
  bool narrow_last = false;  // at most half the lanes of the last one are in use

  Vectors at(int64_t s) const { return {data + s * step, step, count, narrow_last}; }
};

// Only the widest vectors are worth it, and only in the tiles that most products are made of.
constexpr bool may_narrow(int vectors) {
  return kLanes == 16 && (vectors > 1);
}

// What a tile does beside its product. Nothing:
struct Alone {
  PATCHGEN_FAST_INLINE_MEMBER void step() {}
  template <int kVectors>
  PATCHGEN_FAST_INLINE_MEMBER void row(int, const Vec (&)[kVectors]) {}
};

// A line that is needed soon is brought in with each step.
struct BringingLines : Alone {
  explicit BringingLines(const LineWalk& walk) : walk(walk) {}
  PATCHGEN_FAST_INLINE_MEMBER void step() { walk.bring_next(); }

  LineWalk walk;
};

// The rows' maxima are raised to their sums, each row's lane by lane, while the adders idle.
struct RaisingMaxima : Alone {
  explicit RaisingMaxima(float* maxima) : maxima(maxima) {}
  template <int kVectors>
  PATCHGEN_FAST_INLINE_MEMBER void row(int r, const Vec (&sums)[kVectors]) {
    Vec top = load(maxima + r * kLanes);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      top = max(sums[v], top);
    }
    store(maxima + r * kLanes, top);
  }

  float* maxima;
};

template <class Math, int kRows, int kVectors, bool kNarrowLast, bool kAdd, class Beside>
void tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
          int64_t steps, float* c, int64_t c_row, Beside beside) {
  constexpr int kWhole = kVectors - (kNarrowLast ? 1 : 0);
  Vec acc[kRows][kWhole] = {};
  NarrowVec last[kRows] = {};
  for (int64_t step = 0; step < steps; ++step) {
    Vec b_now[kWhole];
#pragma GCC unroll 8
    for (int v = 0; v < kWhole; ++v) {
      b_now[v] = load(b + v * kLanes);
    }
    NarrowVec b_last{};
    if constexpr (kNarrowLast) {
      b_last = load_bits<NarrowVec>(b + kWhole * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec a_now = broadcast(a[r * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < kWhole; ++v) {
        acc[r][v] = Math::multiply_add(acc[r][v], a_now, b_now[v]);
      }
      if constexpr (kNarrowLast) {
        last[r] = Math::multiply_add(last[r], narrow(a_now), b_last);
      }
    }
    a += a_step;
    b += b_step;
    beside.step();
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kWhole; ++v) {
      acc[r][v] = kAdd ? acc[r][v] + load(c + v * kLanes) : acc[r][v];
      store(c + v * kLanes, acc[r][v]);
    }
    beside.row(r, acc[r]);
    if constexpr (kNarrowLast) {
      float* to = c + kWhole * kLanes;
      store(to, widen(kAdd ? last[r] + load_bits<NarrowVec>(to) : last[r]));
    }
    c += c_row;
  }
}

template <class Beside>
using Tile = void (*)(const float*, int64_t, int64_t, const float*, int64_t, int64_t, float*,
                      int64_t, Beside);

template <class Beside, int kRows>
struct Tiles {
  Tile<Beside> of_rows[kRows];  // of 1, 2, ... rows
};

template <class Beside, class Math, int kVectors, bool kNarrowLast, bool kAdd, int... R>
constexpr auto all_tiles(std::integer_sequence<int, R...>) {
  return Tiles<Beside, sizeof...(R)>{{tile<Math, R + 1, kVectors, kNarrowLast, kAdd, Beside>...}};
}

template <class Beside, class Math, int kVectors, bool kNarrowLast>
PATCHGEN_FAST_INLINE Tile<Beside> tile_of(int64_t rows, bool add) {
  constexpr int kRows = max_rows(kVectors);
  using Rows = std::make_integer_sequence<int, kRows>;
  static constexpr auto storing = all_tiles<Beside, Math, kVectors, kNarrowLast, false>(Rows{});
  static constexpr auto adding = all_tiles<Beside, Math, kVectors, kNarrowLast, true>(Rows{});
  return (add ? adding : storing).of_rows[smaller(rows, kRows) - 1];
}

// What is done beside a whole product, if anything.
struct Company {
  Prefetch* ahead = nullptr;  // what comes after is brought in
  float* maxima = nullptr;    // kLanes of each row of c, raised to its sums
};

// Any number of rows, up to kMaxVectors vectors. With `add`, the product is added to c. Bringing in
// lines costs a twentieth of a short product, so tiles that have none to bring in do without.
// Inline, because between short tiles a call shows.
template <class Math, int kVectors = 1, bool kNarrowLast = false>
PATCHGEN_FAST_INLINE void multiply(Units a, int64_t rows, Vectors b, int64_t steps, float* c,
                                   int64_t c_row, bool add = false, Company company = {}) {
  if constexpr (kVectors < kMaxVectors && !kNarrowLast) {
    if (b.count > kVectors) {
      return multiply<Math, kVectors + 1>(a, rows, b, steps, c, c_row, add, company);
    }
  }
  if constexpr (may_narrow(kVectors) && !kNarrowLast) {
    if (b.narrow_last) {
      return multiply<Math, kVectors, true>(a, rows, b, steps, c, c_row, add, company);
    }
  }
  for (int64_t r = 0; r < rows; r += max_rows(kVectors)) {
    const Units a_rows = a.at(r, 0);
    const auto run = [&](auto beside) {
      using Beside = decltype(beside);
      tile_of<Beside, Math, kVectors, kNarrowLast>(rows - r, add)(
          a_rows.data, a.row, a.step, b.data, b.step, steps, c + r * c_row, c_row, beside);
    };
    if constexpr (!kNarrowLast) {
      if (company.ahead != nullptr && company.ahead->any()) {
        run(BringingLines(company.ahead->take(steps)));
        continue;
      }
      if (company.maxima != nullptr) {
        run(RaisingMaxima(company.maxima + r * kLanes));
        continue;
      }
    }
    run(Alone{});
  }
}

// The same over a long contraction, whose running sum would gather rounding errors: floats in runs
// of at most kRun steps, each summed on its own. Beside the rounding of bf16 they do not show.
template <class Math>
void multiply_in_runs(Units a, int64_t rows, Vectors b, int64_t steps, float* c, int64_t c_row,
                      float* maxima) {
  const int64_t longest = Math::kGroup > 1 ? steps : rows <= kFewRows ? kShortRun : kRun;
  const int64_t run = divide_up(steps, larger(1, divide_up(steps, longest)));
  for (int64_t step = 0; step < steps; step += run) {
    const bool last = step + run >= steps;
    multiply<Math>(a.at(0, step), rows, b.at(step), smaller(run, steps - step), c, c_row, step > 0,
                   {nullptr, last ? maxima : nullptr});
  }
}

// Lanes are dims: b holds rows of `columns` units, one row a step; any number of columns.
template <class Math>
void multiply_rows(Units a, int64_t rows, const float* b, int64_t columns, int64_t steps, float* c,
                   bool add = false, Prefetch* ahead = nullptr) {
  const int64_t vectors = columns / kLanes;
  for (int64_t first = 0; first < vectors;) {
    const int64_t width = tile_vectors(vectors - first);
    multiply<Math>(a, rows, {b + first * kLanes, columns, width}, steps, c + first * kLanes,
                   columns, add, {ahead});
    first += width;
  }
}

// Lanes are keys: b holds `panel_keys` keys as `pack_keys` leaves them; the product with the first
// `keys` of them, 0 up to whole vectors. Tiles of keys below `seen` raise `maxima`, kLanes of each
// row; returns how many vectors of keys these tiles are.
template <class Math>
int64_t multiply_keys(Units a, int64_t rows, const float* b, int64_t panel_keys, int64_t keys,
                      int64_t steps, float* c, int64_t c_row, int64_t seen = 0,
                      float* maxima = nullptr) {
  const int64_t panel_vectors = divide_up(panel_keys, kLanes);
  const int64_t vectors = divide_up(keys, kLanes);
  int64_t raised = 0;
  for (int64_t first = 0; first < vectors;) {
    const int64_t width = key_tile_vectors<Math>(panel_vectors - first);
    const int64_t count = smaller(width, vectors - first);
    const int64_t end = first + count;
    const bool narrow_last = keys <= end * kLanes - kLanes / 2;
    raised = end * kLanes <= seen ? end : raised;
    multiply_in_runs<Math>(a, rows, {b, width * kLanes, count, narrow_last}, steps,
                           c + first * kLanes, c_row, raised == end ? maxima : nullptr);
    b += width * kLanes * steps;
    first += width;
  }
  return raised;
}

}  // namespace
}  // namespace patchgen_fast
