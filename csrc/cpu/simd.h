// One small vector of floats, on the vector extensions of GCC and clang.
//
// Compiled once per instruction set, with that set's flags, into the anonymous namespace of its
// file (kernels_isa.h says why). kLanes is 16, 8 or 4; everything is written with operators on
// `Vec`, so the baseline needs no vendor's header and runs on aarch64 and others; intrinsics stand
// where the extension cannot say it: masked memory, dot products of bf16 pairs, scaling by a power
// of two, maxima in one instruction, rounding to 16 bits.
//
//   Vec, VecInt, Half        kLanes floats, 32-bit integers, 16-bit integers
//   NarrowVec narrow widen   half as many floats; the first half of a Vec; with zeros, a Vec
//   broadcast load store     and load_partial, store_partial: the first `count` lanes, 0 elsewhere
//   fma max min select square_root   lane by lane
//   sum_lanes max_lanes      over the lanes
//   transpose                of a kLanes x kLanes tile in registers
//   join_lanes               sums over the lanes of several vectors, as one vector
//   exp2_scaled add_log dot_pairs   simd_math.h
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 header passes an undefined register on purpose, and warns about it.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

#define PATCHGEN_FAST_INLINE static inline __attribute__((always_inline))
#define PATCHGEN_FAST_INLINE_MEMBER inline __attribute__((always_inline))

namespace patchgen_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#if defined(__AVX512BF16__)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

// Vector registers: what bounds the accumulators of a register tile.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

using Vec = float __attribute__((vector_size(kLanes * 4)));
using NarrowVec = float __attribute__((vector_size(kLanes * 2)));
using VecInt = int32_t __attribute__((vector_size(kLanes * 4)));
using VecUint = uint32_t __attribute__((vector_size(kLanes * 4)));
using Half = uint16_t __attribute__((vector_size(kLanes * 2)));
using Byte = uint8_t __attribute__((vector_size(kLanes)));

// -- registers ------------------------------------------------------------------------------------

template <int... I>
PATCHGEN_FAST_INLINE Vec repeat(float x, std::integer_sequence<int, I...>) {
  return Vec{((void)I, x)...};
}

PATCHGEN_FAST_INLINE Vec broadcast(float x) {
  return repeat(x, std::make_integer_sequence<int, kLanes>{});
}

PATCHGEN_FAST_INLINE VecInt broadcast_int(int32_t x) {
  return x - VecInt{};
}

template <class To, class From>
PATCHGEN_FAST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// a * b + c, contracted by the compiler where the machine has the instruction.
PATCHGEN_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return a * b + c;
}

PATCHGEN_FAST_INLINE Vec select(VecInt mask, Vec yes, Vec no) {
  return mask ? yes : no;
}

// Where either is NaN, the result is `b`.
PATCHGEN_FAST_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

PATCHGEN_FAST_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

PATCHGEN_FAST_INLINE Vec square_root(Vec v) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#else
  for (int i = 0; i < kLanes; ++i) {
    v[i] = __builtin_sqrtf(v[i]);
  }
  return v;
#endif
}

// 0, 1, 2, ...
template <int... I>
PATCHGEN_FAST_INLINE VecInt iota(std::integer_sequence<int, I...>) {
  return VecInt{I...};
}

PATCHGEN_FAST_INLINE VecInt iota() {
  return iota(std::make_integer_sequence<int, kLanes>{});
}

// -- permutations ---------------------------------------------------------------------------------

template <int... I>
PATCHGEN_FAST_INLINE NarrowVec narrow(Vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, I...);
}

PATCHGEN_FAST_INLINE NarrowVec narrow(Vec v) {
  return narrow(v, std::make_integer_sequence<int, kLanes / 2>{});
}

template <int... I>
PATCHGEN_FAST_INLINE Vec widen(NarrowVec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, NarrowVec{}, I...);
}

PATCHGEN_FAST_INLINE Vec widen(NarrowVec v) {
  return widen(v, std::make_integer_sequence<int, kLanes>{});
}

template <int Distance, int... I>
PATCHGEN_FAST_INLINE Vec swap_lanes(Vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ Distance)...);
}

template <int Distance = kLanes / 2>
PATCHGEN_FAST_INLINE float sum_lanes(Vec v) {
  if constexpr (Distance == 0) {
    return v[0];
  } else {
    return sum_lanes<Distance / 2>(
        v + swap_lanes<Distance>(v, std::make_integer_sequence<int, kLanes>{}));
  }
}

template <int Distance = kLanes / 2>
PATCHGEN_FAST_INLINE float max_lanes(Vec v) {
  if constexpr (Distance == 0) {
    return v[0];
  } else {
    return max_lanes<Distance / 2>(
        max(v, swap_lanes<Distance>(v, std::make_integer_sequence<int, kLanes>{})));
  }
}

template <int Step, int... I>
PATCHGEN_FAST_INLINE void exchange(Vec& upper, Vec& lower, std::integer_sequence<int, I...>) {
  const Vec a = upper;
  const Vec b = lower;
  upper = __builtin_shufflevector(a, b, (I & Step ? kLanes + I - Step : I)...);
  lower = __builtin_shufflevector(a, b, (I & Step ? kLanes + I : I + Step)...);
}

// rows[i][j] becomes rows[j][i]: log2(kLanes) rounds, each swapping the off-diagonal blocks of
// 2 x 2 blocks of side Step.
template <int Step = 1>
PATCHGEN_FAST_INLINE void transpose(Vec (&rows)[kLanes]) {
  if constexpr (Step < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & Step) == 0) {
        exchange<Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, kLanes>{});
      }
    }
    transpose<Step * 2>(rows);
  }
}

// join_lanes<1> of kLanes vectors: lane i is the sum over the lanes of vectors[i], by the rounds of
// a transposition, each of which halves the vectors. It may be done in two parts: join_lanes<1> of
// every n vectors, then join_lanes<n> of the results.
template <int Step, int Count>
PATCHGEN_FAST_INLINE Vec join_lanes(const Vec (&vectors)[Count]) {
  if constexpr (Count == 1) {
    return vectors[0];
  } else {
    Vec half[Count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < Count / 2; ++i) {
      Vec even = vectors[2 * i];
      Vec odd = vectors[2 * i + 1];
      exchange<Step>(even, odd, std::make_integer_sequence<int, kLanes>{});
      half[i] = even + odd;
    }
    return join_lanes<2 * Step>(half);
  }
}

}  // namespace
}  // namespace patchgen_fast

#include "simd_convert.h"
#include "simd_math.h"
#include "simd_memory.h"
