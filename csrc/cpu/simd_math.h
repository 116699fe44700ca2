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

// 2^x for x <= 128. Below -126 the result loses precision and then is 0; -inf gives 0, NaN NaN.
PATCHGEN_FAST_INLINE Vec exp2_approx(Vec x) {
#if defined(__AVX512F__)
  // x - round(x), then a multiplication by 2^round(x): scalef floors, hence the rounding first.
  const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_fraction(x - n), n);
#else
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum, whence it goes
  // into the exponent. The order of max's operands keeps a NaN, and so does the mask.
  const Vec floored = max(broadcast(-127.0f), x);
  const Vec shifter = broadcast(0x1.8p23f);
  const Vec shifted = floored + shifter;
  const Vec p = exp2_fraction(floored - (shifted - shifter));
  const VecInt power = bit_cast<VecInt>(p) + (bit_cast<VecInt>(shifted) << 23);
  return bit_cast<Vec>(power & ~(x <= broadcast(-127.0f)));
#endif
}

// log2(x) of a positive normal number, to 2 ulp: exponent + 2/ln2 * artanh((m - 1) / (m + 1)) with
// the fraction m in [sqrt(1/2), sqrt(2)), by its odd series (next term below 2^-30).
PATCHGEN_FAST_INLINE Vec log2_approx(Vec x) {
  const VecInt offset = bit_cast<VecInt>(x) - 0x3f3504f3;  // the bits of sqrt(1/2)
  const VecInt exponent = offset >> 23;
  const Vec m = bit_cast<Vec>(bit_cast<VecInt>(x) - (exponent << 23));
  const Vec t = (m - broadcast(1.0f)) / (m + broadcast(1.0f));
  const Vec t2 = t * t;
  Vec series = fma(broadcast(1.0f / 9), t2, broadcast(1.0f / 7));
  series = fma(series, t2, broadcast(1.0f / 5));
  series = fma(series, t2, broadcast(1.0f / 3));
  series = fma(series, t2, broadcast(1.0f));
  return fma(series, t * broadcast(2.88539008f), convert_lanes<Vec>(exponent));
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
