// Conversions between float vectors and the 16-bit formats, rounding to nearest even.
// Included by simd.h.
#pragma once

#include "simd.h"

namespace patchgen_fast {
namespace {

template <class To, class From>
PATCHGEN_FAST_INLINE To convert_lanes(From from) {
  return __builtin_convertvector(from, To);
}

// GCC 12 takes such conversions apart into halves and joins them again: hence the intrinsics.
PATCHGEN_FAST_INLINE VecUint convert_to_32(Half from) {
#if defined(__AVX512F__)
  return bit_cast<VecUint>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(from)));
#elif defined(__AVX2__)
  return bit_cast<VecUint>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(from)));
#else
  return convert_lanes<VecUint>(from);
#endif
}

PATCHGEN_FAST_INLINE VecUint convert_to_32(Byte from) {
#if defined(__AVX512F__)
  return bit_cast<VecUint>(_mm512_cvtepu8_epi32(bit_cast<__m128i>(from)));
#else
  return convert_lanes<VecUint>(from);
#endif
}

// Of numbers below 2^16.
PATCHGEN_FAST_INLINE Half convert_to_16(VecUint from) {
#if defined(__AVX512F__)
  return bit_cast<Half>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(from)));
#elif defined(__AVX2__)
  const __m256i bits = bit_cast<__m256i>(from);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0xd8);
  return bit_cast<Half>(_mm256_castsi256_si128(packed));
#else
  return convert_lanes<Half>(from);
#endif
}

// The bits of bf16 numbers to floats: the upper half of each.
PATCHGEN_FAST_INLINE Vec from_bf16(Half bits) {
  return bit_cast<Vec>(convert_to_32(bits) << 16);
}

// Not a number stays one: its payload is dropped, so that rounding cannot carry it into infinity.
PATCHGEN_FAST_INLINE Half to_bf16(Vec v) {
#if defined(__AVX512BF16__)
  return bit_cast<Half>(_mm512_cvtneps_pbh(v));
#else
  const VecUint bits = bit_cast<VecUint>(v);
  const VecUint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecUint quiet = (bits >> 16) | 0x40u;
  return convert_to_16(v == v ? rounded : quiet);
#endif
}

// As one vector: `low` in its first half.
PATCHGEN_FAST_INLINE Vec to_bf16(Vec low, Vec high) {
#if defined(__AVX512BF16__)
  return bit_cast<Vec>(_mm512_cvtne2ps_pbh(high, low));
#else
  const Half halves[] = {to_bf16(low), to_bf16(high)};
  Vec joined;
  __builtin_memcpy(&joined, halves, sizeof(joined));
  return joined;
#endif
}

PATCHGEN_FAST_INLINE Vec from_fp16(Half bits) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(bit_cast<__m256i>(bits));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(bit_cast<__m128i>(bits));
#else
  // Move exponent and fraction into place; multiplying by 2^112 corrects the exponent's bias, and
  // normalises subnormal numbers on the way. Infinity and NaN (exponent 31) get exponent 255.
  const VecUint wide = convert_to_32(bits);
  const VecUint magnitude = (wide & 0x7fffu) << 13;
  const Vec scaled = bit_cast<Vec>(magnitude) * broadcast(0x1p112f);
  const VecUint special = magnitude | 0x7f800000u;
  const VecUint finite = bit_cast<VecUint>(scaled);
  const VecUint result = (magnitude >= 0x0f800000u) ? special : finite;
  return bit_cast<Vec>(result | ((wide & 0x8000u) << 16));
#endif
}

PATCHGEN_FAST_INLINE Half to_fp16(Vec v) {
#if defined(__AVX512F__)
  return bit_cast<Half>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return bit_cast<Half>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  // Normal results: rebias and round to even in the integer domain (a carry moves into the exponent
  // and, from 65520 on, to infinity). Subnormal results: adding 0.5 leaves the rounded fraction in
  // the low bits of the sum.
  const VecUint bits = bit_cast<VecUint>(v);
  const VecUint sign = (bits >> 16) & 0x8000u;
  const VecUint magnitude = bits & 0x7fffffffu;
  const VecUint normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const Vec shifted = bit_cast<Vec>(magnitude) + broadcast(0.5f);
  const VecUint subnormal = bit_cast<VecUint>(shifted) - 0x3f000000u;
  VecUint result = (magnitude < 0x38800000u) ? subnormal : normal;
  result = (magnitude >= 0x477ff000u) ? (VecUint{} + 0x7c00u) : result;
  result = (magnitude > 0x7f800000u) ? (VecUint{} + 0x7e00u) : result;
  return convert_to_16(result | sign);
#endif
}

}  // namespace
}  // namespace patchgen_fast
