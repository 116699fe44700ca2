// Activations and their derivatives, in float.
//
//     relu       max(x, 0)
//     gelu       x * P(x), P the normal distribution's integral: P(-|x|) = erfc(|x| / sqrt(2)) / 2
//     gelu_tanh  x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3))
//     silu       x * sigmoid(x)
//
// What will be rounded to 16 bits is computed only so far that this hardly shows: gelu to 5e-5 of
// its value (fp16) and 1.5e-4 (bf16), a fifth and a thirteenth of half a unit in the last place.
#pragma once

#include "linear.h"
#include "simd.h"

namespace patchgen_fast {
namespace {

// Degree of the polynomial for powers of two in what is rounded to `Out`.
template <class Out>
constexpr int kExpDegree = 5;
template <>
constexpr int kExpDegree<Float16> = 4;
template <>
constexpr int kExpDegree<BFloat16> = 3;

// e^x, from 1e-45 to 1e38: beyond, what the functions below make of it no longer changes. NaN
// stays.
template <class Out = float>
PATCHGEN_FAST_INLINE Vec exponential(Vec x) {
  Vec bounded[] = {min(broadcast(87.3f), max(broadcast(-103.0f), x))};
  exp2_scaled<kExpDegree<Out>>(bounded, broadcast(1.44269504f));
  return bounded[0];
}

template <class Out = float>
PATCHGEN_FAST_INLINE Vec sigmoid(Vec x) {
  return 1.0f / (1.0f + exponential<Out>(-x));
}

PATCHGEN_FAST_INLINE Vec absolute(Vec x) {
  return bit_cast<Vec>(bit_cast<VecUint>(x) & 0x7fffffffu);
}

// erfc(z) * exp(z^2) for 0 <= z <= 9.5, beyond which erfc is 0 in float: a polynomial of degree 8
// in 1 / (1 + 0.4 z), minimax in relative error (1.0e-7).
PATCHGEN_FAST_INLINE Vec scaled_erfc(Vec z) {
  const Vec t = 1.0f / fma(z, broadcast(0.4f), broadcast(1.0f));
  Vec p = broadcast(0.0723060174f);
  p = fma(p, t, broadcast(-0.388670132f));
  p = fma(p, t, broadcast(0.681473131f));
  p = fma(p, t, broadcast(-0.383218226f));
  p = fma(p, t, broadcast(0.425617734f));
  p = fma(p, t, broadcast(0.127106619f));
  p = fma(p, t, broadcast(0.241334116f));
  p = fma(p, t, broadcast(0.223971275f));
  return fma(p, t, broadcast(7.93649521e-05f));
}

struct Normal {
  Vec integral;  // from -infinity to x
  Vec density;
};

PATCHGEN_FAST_INLINE Normal normal(Vec x) {
  const Vec bell = exponential(x * x * -0.5f);
  const Vec tail = scaled_erfc(absolute(x) * 0.707106781f) * bell * 0.5f;
  return {select(x < 0.0f, tail, 1.0f - tail), bell * 0.398942280f};
}

// gelu(x) = max(x, 0) - |x| P(-|x|) for 16 bits, without a division. log2(P(-z)) is nearly a
// parabola: here to 4.8e-5 of P for z up to 6, where the product is 6e-9. Further out it falls
// somewhat more slowly than P, to 2^-133 at the bound.
constexpr int kLogTailDegree = 6;
constexpr float kLogTail[] = {2.29900616e-05f,  -6.11100113e-04f, 7.19556632e-03f, -5.11853397e-02f,
                              -4.61271912e-01f, -1.15017426f,     -1.00006473f};
constexpr float kLogTailBound = 15.0f;

template <class Out, int kCount>
PATCHGEN_FAST_INLINE void short_gelu(Vec (&x)[kCount]) {
  Vec z[kCount], tail[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    z[i] = min(broadcast(kLogTailBound), absolute(x[i]));
    tail[i] = broadcast(kLogTail[0]);
  }
#pragma GCC unroll 8
  for (int k = 1; k <= kLogTailDegree; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      tail[i] = fma(tail[i], z[i], broadcast(kLogTail[k]));
    }
  }
  exp2_scaled<kExpDegree<Out>>(tail, broadcast(1.0f));
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    x[i] = max(broadcast(0.0f), x[i]) - z[i] * tail[i];
  }
}

constexpr float kTanhScale = 1.59576912f;  // 2 * sqrt(2 / pi)

PATCHGEN_FAST_INLINE Vec tanh_argument(Vec x) {
  return kTanhScale * fma(x * x * x, broadcast(0.044715f), x);
}

template <Activation Kind, class Out>
PATCHGEN_FAST_INLINE Vec activate(Vec x) {
  if constexpr (Kind == Activation::relu) {
    return max(broadcast(0.0f), x);  // in this order NaN stays NaN
  } else if constexpr (Kind == Activation::gelu) {
    return x * normal(x).integral;
  } else if constexpr (Kind == Activation::gelu_tanh) {
    return x * sigmoid<Out>(tanh_argument(x));
  } else if constexpr (Kind == Activation::silu) {
    return x * sigmoid<Out>(x);
  } else {
    return x;
  }
}

// Of what will be rounded to `Out`.
template <Activation Kind, class Out, int kCount>
PATCHGEN_FAST_INLINE void activate(Vec (&x)[kCount]) {
  if constexpr (Kind == Activation::gelu && sizeof(Out) == 2) {
    short_gelu<Out>(x);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      x[i] = activate<Kind, Out>(x[i]);
    }
  }
}

template <Activation Kind>
PATCHGEN_FAST_INLINE Vec derivative(Vec x) {
  if constexpr (Kind == Activation::relu) {
    return select(x > 0.0f, broadcast(1.0f), broadcast(0.0f));
  } else if constexpr (Kind == Activation::gelu) {
    const Normal n = normal(x);
    return fma(x, n.density, n.integral);
  } else if constexpr (Kind == Activation::gelu_tanh) {
    const Vec s = sigmoid(tanh_argument(x));
    const Vec inner = kTanhScale * fma(x * x, broadcast(3 * 0.044715f), broadcast(1.0f));
    return fma(x * s * (1.0f - s), inner, s);
  } else if constexpr (Kind == Activation::silu) {
    const Vec s = sigmoid(x);
    return fma(x * s, 1.0f - s, s);
  } else {
    return broadcast(1.0f);
  }
}

// body(std::integral_constant<Activation, kind>{}), so that loops are compiled for each kind.
template <class Body>
PATCHGEN_FAST_INLINE void for_activation(Activation kind, const Body& body) {
  switch (kind) {
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>{});
    case Activation::gelu:
      return body(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return body(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::silu:
      return body(std::integral_constant<Activation, Activation::silu>{});
    default:
      return body(std::integral_constant<Activation, Activation::none>{});
  }
}

}  // namespace
}  // namespace patchgen_fast
