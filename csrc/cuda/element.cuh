// The 16-bit element types and what a kernel does with them.
#pragma once

#include "ptx.cuh"

namespace patchgen_fast::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

PATCHGEN_DEVICE float to_float(float x) {
  return x;
}
PATCHGEN_DEVICE float to_float(uint8_t x) {
  return static_cast<float>(x);
}
PATCHGEN_DEVICE float to_float(bfloat16 x) {
  return bits_to_float(static_cast<uint32_t>(x.bits) << 16);
}
PATCHGEN_DEVICE float to_float(float16 x) {
  return float16_to_float(x.bits);
}

// Two float32 rounded to T (to nearest even) in one register, `low` in the low half.
template <class T>
PATCHGEN_DEVICE uint32_t pack(float low, float high);
template <>
PATCHGEN_DEVICE uint32_t pack<bfloat16>(float low, float high) {
  return pack_bfloat16(low, high);
}
template <>
PATCHGEN_DEVICE uint32_t pack<float16>(float low, float high) {
  return pack_float16(low, high);
}

// The element at position `half` (0 low, 1 high) of such a register, as float32.
template <class T>
PATCHGEN_DEVICE float unpack(uint32_t packed, int half) {
  return to_float(T{static_cast<uint16_t>(half ? packed >> 16 : packed & 0xFFFFu)});
}

template <class T>
PATCHGEN_DEVICE T from_float(float x) {
  return T{static_cast<uint16_t>(pack<T>(x, 0.f) & 0xFFFFu)};
}
template <>
PATCHGEN_DEVICE float from_float<float>(float x) {
  return x;
}

// d[16, 8] += a[16, 16] b[16, 8], and the same over 8 instead of 16.
PATCHGEN_DEVICE void multiply(bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                              uint32_t b1) {
  mma_k16_bfloat16(d, a, b0, b1);
}
PATCHGEN_DEVICE void multiply(float16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                              uint32_t b1) {
  mma_k16_float16(d, a, b0, b1);
}
PATCHGEN_DEVICE void multiply(bfloat16, float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  mma_k8_bfloat16(d, a, b);
}
PATCHGEN_DEVICE void multiply(float16, float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  mma_k8_float16(d, a, b);
}

}  // namespace patchgen_fast::cuda
