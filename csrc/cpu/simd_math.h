// Arithmetic beyond the operators: powers of two, and dot products of bf16 pairs. Included by
// simd.h.
#pragma once

#include "simd_memory.h"

namespace patchgen_fast {
namespace {

// 2^r for r in [-0.5, 0.5], minimax in relative error among the polynomials with p(0) = 1, so that
// the largest score of a row has weight 1 exactly; highest power first.
template <int kDegree>
constexpr float kExp2[kDegree + 1] = {};
template <>  // to 1.9e-7
constexpr float kExp2<5>[] = {0.00132647272f, 0.00967151268f, 0.0555073374f,
                              0.240222421f,   0.693146978f,   1.0f};
template <>  // to 2.8e-6, for what is rounded to fp16
constexpr float kExp2<4>[] = {0.00958285294f, 0.0559064262f, 0.240240991f, 0.693124175f, 1.0f};
template <>  // to 1.0e-4, for what is rounded to bf16
constexpr float kExp2<3>[] = {0.0550090578f, 0.242210975f, 0.693282898f, 1.0f};

// A vector after the other would fill the scheduler with operations that wait for each other; so
// all vectors take each step before the next.
template <int kDegree, int kCount>
PATCHGEN_FAST_INLINE void exp2_fractions(const Vec (&r)[kCount], Vec (&p)[kCount]) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    p[i] = fma(broadcast(kExp2<kDegree>[0]), r[i], broadcast(kExp2<kDegree>[1]));
  }
#pragma GCC unroll 8
  for (int k = 2; k <= kDegree; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      p[i] = fma(p[i], r[i], broadcast(kExp2<kDegree>[k]));
    }
  }
}

// x * factor = power + fraction, the power whole and the fraction in [-0.5, 0.5]: what
// 2^(x * factor) is joined from. In two halves, so that a loop can begin with the next vectors
// before it ends with these.
template <int kCount>
struct Exponents {
  Vec power[kCount], fraction[kCount];
#if !defined(__AVX512F__)
  VecInt kept[kCount];  // 0 where 2^power is 0, else all bits
#endif
};

// The fraction is taken from the exact product, so that x * factor is never rounded: for x of -10
// that would be an error of several units in the last place.
template <int kCount>
PATCHGEN_FAST_INLINE Exponents<kCount> split_exponents(const Vec (&x)[kCount], Vec factor) {
  Exponents<kCount> e;
#if defined(__AVX512F__)
  // Far below, as under a mask of finfo.min, the product's rounding error is itself a huge number,
  // of which the series would make infinity; 2^power is 0 there, whatever the fraction.
  const Vec least = broadcast(-256.0f);
  __mmask16 near[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    const Vec product = x[i] * factor;
    near[i] = _mm512_cmp_ps_mask(product, least, _CMP_GT_OQ);
    e.power[i] = _mm512_roundscale_ps(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    // GCC would use the product of above once more, and subtract.
    e.fraction[i] = _mm512_maskz_fmsub_ps(near[i], x[i], factor, e.power[i]);
  }
#else
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum, whence it goes
  // into the exponent. The order of max's operands keeps a NaN, and so does the mask.
  const Vec shifter = broadcast(0x1.8p23f);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    const Vec product = x[i] * factor;
    e.kept[i] = ~(product <= broadcast(-127.0f));
    e.power[i] = max(broadcast(-127.0f), product) + shifter;
    e.fraction[i] = fma(x[i], factor, shifter - e.power[i]);
  }
#endif
  return e;
}

// 2^(power + fraction) where that is at most 2^128. Below 2^-126 the result loses precision and
// then is 0; -inf gives 0, NaN NaN.
template <int kDegree, int kCount>
PATCHGEN_FAST_INLINE void exp2_joined(const Exponents<kCount>& e, Vec (&p)[kCount]) {
  exp2_fractions<kDegree>(e.fraction, p);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#if defined(__AVX512F__)
    p[i] = _mm512_scalef_ps(p[i], e.power[i]);
#else
    // Unsigned: what the mask takes off, a hidden score's -inf, may wrap around.
    const VecUint bits = bit_cast<VecUint>(p[i]) + (bit_cast<VecUint>(e.power[i]) << 23);
    p[i] = bit_cast<Vec>(bits & bit_cast<VecUint>(e.kept[i]));
#endif
  }
}

// x becomes 2^(x * factor).
template <int kDegree = 5, int kCount>
PATCHGEN_FAST_INLINE void exp2_scaled(Vec (&x)[kCount], Vec factor) {
  exp2_joined<kDegree>(split_exponents(x, factor), x);
}

PATCHGEN_FAST_INLINE Vec exp2_scaled(Vec x, Vec factor) {
  Vec only[] = {x};
  exp2_scaled(only, factor);
  return only[0];
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

#if defined(__AVX512BF16__)
// The first `count` numbers, as the bits of floats; 0 for the others.
PATCHGEN_FAST_INLINE Vec load_pairs_up_to(const BFloat16* from, int64_t count) {
  const __mmask32 present = count >= 2 * kLanes ? ~0u : (1u << count) - 1u;
  return bit_cast<Vec>(_mm512_maskz_loadu_epi16(present, from));
}
#endif

// acc + a.first * b.first + a.second * b.second
PATCHGEN_FAST_INLINE Vec dot_pairs(Vec acc, Pairs a, Pairs b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(acc, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
#else
  acc = fma(bit_cast<Vec>(a << 16), bit_cast<Vec>(b << 16), acc);
  return fma(bit_cast<Vec>(a & 0xffff0000u), bit_cast<Vec>(b & 0xffff0000u), acc);
#endif
}

PATCHGEN_FAST_INLINE NarrowVec dot_pairs(NarrowVec acc, NarrowVec a, NarrowVec b) {
#if defined(__AVX512BF16__)
  return _mm256_dpbf16_ps(acc, bit_cast<__m256bh>(a), bit_cast<__m256bh>(b));
#else
  return narrow(dot_pairs(widen(acc), bit_cast<Pairs>(widen(a)), bit_cast<Pairs>(widen(b))));
#endif
}

}  // namespace
}  // namespace patchgen_fast
