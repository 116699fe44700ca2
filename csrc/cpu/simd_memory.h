// Loads and stores of vectors as float, bf16, fp16 or bytes, unaligned, whole or the first `count`
// lanes (0 <= count <= kLanes): a partial access touches no byte beyond. Included by simd.h.
#pragma once

#include "simd_convert.h"

namespace patchgen_fast {
namespace {

template <class Register>
PATCHGEN_FAST_INLINE Register load_bits(const void* from) {
  Register bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return bits;
}

template <class Register>
PATCHGEN_FAST_INLINE void store_bits(void* to, Register bits) {
  __builtin_memcpy(to, &bits, sizeof(bits));
}

#if defined(__AVX512F__)
PATCHGEN_FAST_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}
#endif

// Through the stack: the fallback for sets without masked memory, and rarely on a hot path.
template <class Register, class Element>
PATCHGEN_FAST_INLINE Register load_lanes(const Element* from, int64_t count) {
  Element lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    lanes[i] = from[i];
  }
  return load_bits<Register>(lanes);
}

template <class Register, class Element>
PATCHGEN_FAST_INLINE void store_lanes(Element* to, Register bits, int64_t count) {
  Element lanes[kLanes];
  store_bits(lanes, bits);
  for (int64_t i = 0; i < count; ++i) {
    to[i] = lanes[i];
  }
}

PATCHGEN_FAST_INLINE Half load_half_partial(const void* from, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return bit_cast<Half>(_mm256_maskz_loadu_epi16(first_lanes(count), from));
#else
  return load_lanes<Half>(static_cast<const uint16_t*>(from), count);
#endif
}

PATCHGEN_FAST_INLINE void store_half_partial(void* to, Half bits, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(to, first_lanes(count), bit_cast<__m256i>(bits));
#else
  store_lanes(static_cast<uint16_t*>(to), bits, count);
#endif
}

template <class Element>
PATCHGEN_FAST_INLINE Half load_half_up_to(const Element* from, int64_t count) {
  return count >= kLanes ? load_bits<Half>(from) : load_half_partial(from, count);
}

// -- float ----------------------------------------------------------------------------------------

PATCHGEN_FAST_INLINE Vec load(const float* from) {
  return load_bits<Vec>(from);
}
PATCHGEN_FAST_INLINE void store(float* to, Vec v) {
  store_bits(to, v);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
PATCHGEN_FAST_INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), (__m256i)iota());
}
#endif

PATCHGEN_FAST_INLINE Vec load_partial(const float* from, int64_t count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(first_lanes(count), from);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(from, first_lanes(count));
#else
  return load_lanes<Vec>(from, count);
#endif
}

PATCHGEN_FAST_INLINE void store_partial(float* to, Vec v, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, first_lanes(count), v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(to, first_lanes(count), v);
#else
  store_lanes(to, v, count);
#endif
}

// -- bf16, fp16 -----------------------------------------------------------------------------------

PATCHGEN_FAST_INLINE Vec load(const BFloat16* from) {
  return from_bf16(load_bits<Half>(from));
}
PATCHGEN_FAST_INLINE Vec load(const Float16* from) {
  return from_fp16(load_bits<Half>(from));
}
PATCHGEN_FAST_INLINE void store(BFloat16* to, Vec v) {
  store_bits(to, to_bf16(v));
}
PATCHGEN_FAST_INLINE void store(Float16* to, Vec v) {
  store_bits(to, to_fp16(v));
}

PATCHGEN_FAST_INLINE Vec load_partial(const BFloat16* from, int64_t count) {
  return from_bf16(load_half_partial(from, count));
}
PATCHGEN_FAST_INLINE Vec load_partial(const Float16* from, int64_t count) {
  return from_fp16(load_half_partial(from, count));
}
PATCHGEN_FAST_INLINE void store_partial(BFloat16* to, Vec v, int64_t count) {
  store_half_partial(to, to_bf16(v), count);
}
PATCHGEN_FAST_INLINE void store_partial(Float16* to, Vec v, int64_t count) {
  store_half_partial(to, to_fp16(v), count);
}

// -- bytes: 0 to 255 ------------------------------------------------------------------------------

PATCHGEN_FAST_INLINE Vec load(const uint8_t* from) {
  return convert_lanes<Vec>(bit_cast<VecInt>(convert_to_32(load_bits<Byte>(from))));
}
PATCHGEN_FAST_INLINE Vec load_partial(const uint8_t* from, int64_t count) {
  return convert_lanes<Vec>(bit_cast<VecInt>(convert_to_32(load_lanes<Byte>(from, count))));
}

// -- one element ----------------------------------------------------------------------------------

template <class Element>
PATCHGEN_FAST_INLINE float load_one(const Element* from) {
  return load_partial(from, 1)[0];
}
PATCHGEN_FAST_INLINE float load_one(const float* from) {
  return *from;
}
PATCHGEN_FAST_INLINE float load_one(const BFloat16* from) {
  return bit_cast<float>(static_cast<uint32_t>(from->bits) << 16);
}

// `count` lanes, or all of them where the whole vector fits: the loop's last step.
template <class Element>
PATCHGEN_FAST_INLINE Vec load_up_to(const Element* from, int64_t count) {
  return count >= kLanes ? load(from) : load_partial(from, count);
}
template <class Element>
PATCHGEN_FAST_INLINE void store_up_to(Element* to, Vec v, int64_t count) {
  if (count >= kLanes) {
    store(to, v);
  } else {
    store_partial(to, v, count);
  }
}

}  // namespace
}  // namespace patchgen_fast
