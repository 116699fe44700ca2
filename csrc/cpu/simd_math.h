// Arithmetic beyond the operators: powers of two, and dot products of bf16 pairs. Included by
// simd.h.
#pragma once

#include "simd_memory.h"

namespace patchgen_fast {
namespace {

// 2^r for r in [-0.5, 0.5] to 1.9e-7, minimax in relative error among the polynomials with p(0) =
// 1, so that the largest score of a row has weight 1 exactly. A lower degree would do for bf16
// weights but not for their float32 log-sum-exp.
PATCHGEN_FAST_INLINE Vec exp2_fraction(Vec r) {
  Vec p = fma(broadcast(0.00132647272f), r, broadcast(0.00967151268f));
  p = fma(p, r, broadcast(0.0555073374f));
  p = fma(p, r, broadcast(0.240222421f));
  p = fma(p, r, broadcast(0.693146978f));
  return fma(p, r, broadcast(1.0f));
}

// 2^(x * factor) where that is at most 2^128. Below 2^-126 the result loses precision and then is
// 0; -inf gives 0, NaN NaN. The fraction is taken from the exact product, so that x * factor is
// never rounded: for x of -10 that would be an error of several units in the last place.
PATCHGEN_FAST_INLINE Vec exp2_scaled(Vec x, Vec factor) {
#if defined(__AVX512F__)
  const Vec n = _mm512_roundscale_ps(x * factor, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_fraction(fma(x, factor, -n)), n);
#else
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum, whence it goes
  // into the exponent. The order of max's operands keeps a NaN, and so does the mask.
  const Vec product = x * factor;
  const Vec shifter = broadcast(0x1.8p23f);
  const Vec shifted = max(broadcast(-127.0f), product) + shifter;
  const Vec p = exp2_fraction(fma(x, factor, shifter - shifted));
  // Unsigned: what the mask takes off, a hidden score's -inf, may wrap around.
  const VecUint power = bit_cast<VecUint>(p) + (bit_cast<VecUint>(shifted) << 23);
  return bit_cast<Vec>(power & ~bit_cast<VecUint>(product <= broadcast(-127.0f)));
#endif
}

// base + ln(x) of a positive normal x: x = 2^exponent * m with the fraction m in [sqrt(1/2),
// sqrt(2)), and ln(m) = 2 artanh((m - 1) / (m + 1)) by its odd series (next term below 2^-30). What
// is small is added up first, so that the result is rounded twice at its own size, not four times.
PATCHGEN_FAST_INLINE Vec add_log(Vec base, Vec x) {
  const VecInt offset = bit_cast<VecInt>(x) - 0x3f3504f3;  // the bits of sqrt(1/2)
  const VecInt exponent = offset >> 23;
  const Vec m = bit_cast<Vec>(bit_cast<VecInt>(x) - (exponent << 23));
  const Vec t = (m - broadcast(1.0f)) / (m + broadcast(1.0f));
  const Vec t2 = t * t;
  Vec series = fma(broadcast(2.0f / 9), t2, broadcast(2.0f / 7));
  series = fma(series, t2, broadcast(2.0f / 5));
  series = fma(series, t2, broadcast(2.0f / 3));
  series = fma(series, t2, broadcast(2.0f));
  return fma(convert_lanes<Vec>(exponent), broadcast(0.69314718f), fma(series, t, base));
}

// Two bf16 numbers in each 32-bit lane, the first in the low half.
using Pairs = VecUint;

PATCHGEN_FAST_INLINE Pairs load_pairs(const void* from) {
  return load_bits<Pairs>(from);
}

// acc + a.first * b.first + a.second * b.second
PATCHGEN_FAST_INLINE Vec dot_pairs(Vec acc, Pairs a, Pairs b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(acc, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
#else
  acc = fma(bit_cast<Vec>(a << 16), bit_cast<Vec>(b << 16), acc);
  return fma(bit_cast<Vec>(a & 0xffff0000u), bit_cast<Vec>(b & 0xffff0000u), acc);
#endif
}

}  // namespace
}  // namespace patchgen_fast
