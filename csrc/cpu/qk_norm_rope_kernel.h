// Normalisation of queries and keys and rotary embedding, in one pass.
//
//     y = normalise(x) * weight + bias       over D: x / rms, or (x - mean) / deviation
//     out = y * cos + turn(y) * sin          turn: (a, b) to (-b, a), pairs of halves or of
//     neighbours
//
// A forward task owns kRopeTokens tokens of one image, all heads of query and key; a row of D
// elements stays in L1 as floats between its steps. Bytes moved: every tensor once. A backward task
// owns kRopeBackwardTokens tokens of all images and heads, so that it alone owns their gradients of
// cos and sin even where these are shared; gradients of weights and biases are summed per task,
// then over the tasks in order. Nothing depends on the threads.
#pragma once

#include "layer_norm_kernel.h"
#include "qk_norm_rope.h"

namespace patchgen_fast {
namespace {

// Rows are padded with zeros to whole vectors, and by one more, for loads half a row along.
PATCHGEN_FAST_INLINE int64_t rope_pitch(int64_t width) {
  return round_up(width, 16) + 16;
}

// Elements from `row` on: index counts both halves; the pair of element i is i +- D / 2, or i ^ 1.
struct Turn {
  bool interleaved;
  int64_t width;

  // turn(y)[i...]: the partner of each element, with its sign.
  PATCHGEN_FAST_INLINE_MEMBER Vec load_turned(const float* y, int64_t i) const {
    if (interleaved) {
      const Vec swapped = swap_neighbours(load(y + i));
      return select((iota() & 1) == 0, -swapped, swapped);
    }
    return i < width / 2 ? -load(y + i + width / 2) : load(y + i - width / 2);
  }

 private:
  static inline __attribute__((always_inline)) Vec swap_neighbours(Vec v) {
    return swap_lanes<1>(v, std::make_integer_sequence<int, kLanes>{});
  }
};

// body(i, count) for vectors that lie within one half of the row.
template <class Body>
PATCHGEN_FAST_INLINE void for_each_vector(const Turn& turn, const Body& body) {
  const int64_t part = turn.interleaved ? turn.width : turn.width / 2;
  for (int64_t first = 0; first < turn.width; first += part) {
    for (int64_t i = 0; i < part; i += kLanes) {
      body(first + i, part - i);
    }
  }
}

// The row as floats, normalised, without weights; gives back 1 / deviation.
template <class T>
PATCHGEN_FAST_INLINE float normalise_row(const QkNormRope& q, const T* x, float* normed) {
  for (int64_t i = 0; i < q.width; i += kLanes) {
    store(normed + i, load_up_to(x + i, q.width - i));
  }
  if (q.norm == QkNorm::none) {
    return 1.0f;
  }
  RowStatistics statistics{0.0f, 0.0f};
  if (q.norm == QkNorm::layer) {
    statistics = row_statistics(normed, q.width, q.eps);
  } else {
    Vec squares{};
    for (int64_t i = 0; i < q.width; i += kLanes) {
      squares = fma(load(normed + i), load(normed + i), squares);
    }
    const float mean_square = sum_lanes(squares) / static_cast<float>(q.width);
    statistics.rstd = 1.0f / __builtin_sqrtf(mean_square + q.eps);
  }
  for (int64_t i = 0; i < q.width; i += kLanes) {
    store(normed + i, (load(normed + i) - statistics.mean) * statistics.rstd);
  }
  return statistics.rstd;
}

PATCHGEN_FAST_INLINE Vec weighted(const RotatedTensor& t, Vec x, int64_t i, int64_t left) {
  if (t.weight != nullptr) {
    x *= load_up_to(t.weight + i, left);
  }
  if (t.bias != nullptr) {
    x += load_up_to(t.bias + i, left);
  }
  return x;
}

// Where cos and sin of a token lie; null for prefix tokens.
struct Angles {
  const float* cos;
  const float* sin;
};

PATCHGEN_FAST_INLINE Angles angles_of(const QkNormRope& q, int64_t b, int64_t h, int64_t n) {
  if (q.cos == nullptr || n < q.prefix) {
    return {nullptr, nullptr};
  }
  n -= q.prefix;
  return {q.cos + b * q.cos_stride_b + h * q.cos_stride_h + n * q.cos_stride_n,
          q.sin + b * q.sin_stride_b + h * q.sin_stride_h + n * q.sin_stride_n};
}

template <class T>
PATCHGEN_FAST_INLINE T* result_row(const QkNormRope& q, const RotatedTensor& t, int64_t b,
                                   int64_t h, int64_t n) {
  return static_cast<T*>(t.out) + ((b * q.tokens + n) * t.heads + h) * q.width;
}

// -- forward --------------------------------------------------------------------------------------

template <class T>
static void rotate_row(const QkNormRope& q, const RotatedTensor& t, const T* x, Angles angles,
                       T* out, float* y) {
  normalise_row(q, x, y);
  if (angles.cos == nullptr) {
    for (int64_t i = 0; i < q.width; i += kLanes) {
      store_up_to(out + i, weighted(t, load(y + i), i, q.width - i), q.width - i);
    }
    return;
  }
  if (t.weight != nullptr || t.bias != nullptr) {
    for (int64_t i = 0; i < q.width; i += kLanes) {
      store(y + i, weighted(t, load(y + i), i, q.width - i));
    }
  }
  const Turn turn{q.interleaved, q.width};
  for_each_vector(turn, [&](int64_t i, int64_t count) {
    const Vec turned = turn.load_turned(y, i) * load_up_to(angles.sin + i, count);
    store_up_to(out + i, fma(load(y + i), load_up_to(angles.cos + i, count), turned), count);
  });
}

template <class T>
static void rotate_tokens(const QkNormRope& q, int64_t b, int64_t first, int64_t last, float* y) {
  for (const RotatedTensor& t : q.tensors) {
    for (int64_t n = first; n < last; ++n) {
      for (int64_t h = 0; h < t.heads; ++h) {
        const T* x = static_cast<const T*>(t.x) + b * t.stride_b + h * t.stride_h + n * t.stride_n;
        rotate_row(q, t, x, angles_of(q, b, h, n), result_row<T>(q, t, b, h, n), y);
      }
    }
  }
}

// -- backward -------------------------------------------------------------------------------------

// A backward task's rows of floats.
struct RopeRows {
  float* normed;       // normalised, without weights
  float* affine;       // with weights: what was rotated
  float* grad;         // of the result
  float* turned;       // grad * sin, then the gradient of what was rotated
  float* grad_weight;  // sums, each followed by what it has lost
  float* grad_bias;
  int64_t pitch;
};

PATCHGEN_FAST_INLINE void add_to(float* sums, int64_t i, int64_t count, Vec x) {
  store_up_to(sums + i, load_up_to(sums + i, count) + x, count);
}

// The gradients of cos and sin, of one row.
static void differentiate_angles(const QkNormRope& q, int64_t b, int64_t h, int64_t n,
                                 const RopeRows& rows) {
  const int64_t offset = b * q.grad_stride_b + h * q.grad_stride_h + (n - q.prefix) * q.width;
  const Turn turn{q.interleaved, q.width};
  for_each_vector(turn, [&](int64_t i, int64_t count) {
    const Vec g = load(rows.grad + i);
    add_to(q.grad_cos + offset, i, count, g * load(rows.affine + i));
    add_to(q.grad_sin + offset, i, count, g * turn.load_turned(rows.affine, i));
  });
}

// grad = grad * cos - turn(grad * sin): the transpose of the rotation.
static void rotate_back(const QkNormRope& q, Angles angles, const RopeRows& rows) {
  for (int64_t i = 0; i < q.width; i += kLanes) {
    store(rows.turned + i, load(rows.grad + i) * load_up_to(angles.sin + i, q.width - i));
  }
  const Turn turn{q.interleaved, q.width};
  for_each_vector(turn, [&](int64_t i, int64_t count) {
    const Vec x = fma(load(rows.grad + i), load_up_to(angles.cos + i, count),
                      -turn.load_turned(rows.turned, i));
    store_up_to(rows.grad + i, x, count);
  });
}

// From the gradient of the weighted row to that of x.
template <class T>
static void differentiate_norm(const QkNormRope& q, const RotatedTensor& t, float rstd,
                               const RopeRows& rows, T* out) {
  Vec sum{}, product{};
  for (int64_t i = 0; i < q.width; i += kLanes) {
    const int64_t left = q.width - i;
    const Vec normed = load(rows.normed + i);
    Vec g = load_up_to(rows.grad + i, left);
    add_compensated(rows.grad_weight + i, rows.pitch, g * normed);
    add_compensated(rows.grad_bias + i, rows.pitch, g);
    if (t.weight != nullptr) {
      g *= load_up_to(t.weight + i, left);
    }
    store(rows.grad + i, g);
    sum += g;
    product = fma(g, normed, product);
  }
  const float inverse = 1.0f / static_cast<float>(q.width);
  const float mean = q.norm == QkNorm::layer ? sum_lanes(sum) * inverse : 0.0f;
  const float mean_product = q.norm == QkNorm::none ? 0.0f : sum_lanes(product) * inverse;
  for (int64_t i = 0; i < q.width; i += kLanes) {
    const Vec x = load(rows.grad + i) - mean - load(rows.normed + i) * mean_product;
    store_up_to(out + i, x * rstd, q.width - i);
  }
}

template <class T>
static void differentiate_row(const QkNormRope& q, const RotatedTensor& t, int64_t b, int64_t h,
                              int64_t n, const RopeRows& rows) {
  const T* x = static_cast<const T*>(t.x) + b * t.stride_b + h * t.stride_h + n * t.stride_n;
  const T* grad = static_cast<const T*>(t.grad) + b * t.grad_stride_b + h * t.grad_stride_h +
                  n * t.grad_stride_n;
  const float rstd = normalise_row(q, x, rows.normed);
  for (int64_t i = 0; i < q.width; i += kLanes) {
    store(rows.grad + i, load_up_to(grad + i, q.width - i));
    store(rows.affine + i, weighted(t, load(rows.normed + i), i, q.width - i));
  }
  const Angles angles = angles_of(q, b, h, n);
  if (angles.cos != nullptr) {
    if (q.grad_cos != nullptr) {
      differentiate_angles(q, b, h, n, rows);
    }
    rotate_back(q, angles, rows);
  }
  differentiate_norm(q, t, rstd, rows, result_row<T>(q, t, b, h, n));
}

// All rows of one tensor at the tokens [first, last), and the sums of its parameters' gradients.
template <class T>
static void differentiate_tokens(const QkNormRope& q, const RotatedTensor& t, int64_t first,
                                 int64_t last, const RopeRows& rows) {
  for (int64_t i = 0; i < 2 * rows.pitch; i += kLanes) {
    store(rows.grad_weight + i, Vec{});
    store(rows.grad_bias + i, Vec{});
  }
  for (int64_t b = 0; b < q.batch; ++b) {
    for (int64_t n = first; n < last; ++n) {
      for (int64_t h = 0; h < t.heads; ++h) {
        differentiate_row<T>(q, t, b, h, n, rows);
      }
    }
  }
}

// -- the kernel table's entries -------------------------------------------------------------------

static size_t qk_norm_rope_scratch(int64_t width) {
  return static_cast<size_t>(8 * rope_pitch(width)) * sizeof(float);
}

static void qk_norm_rope_forward(const QkNormRope& q, int64_t task, void* scratch) {
  const int64_t blocks = divide_up(q.tokens, kRopeTokens);
  const int64_t first = task % blocks * kRopeTokens;
  const int64_t last = smaller(q.tokens, first + kRopeTokens);
  for_float_type(q.dtype, [&]<class T>(T) {
    rotate_tokens<T>(q, task / blocks, first, last, static_cast<float*>(scratch));
  });
}

static void qk_norm_rope_backward(const QkNormRope& q, int64_t task, void* scratch) {
  const int64_t first = task * kRopeBackwardTokens;
  const int64_t last = smaller(q.tokens, first + kRopeBackwardTokens);
  const int64_t pitch = rope_pitch(q.width);
  float* space = static_cast<float*>(scratch);
  const RopeRows rows{space,
                      space + pitch,
                      space + 2 * pitch,
                      space + 3 * pitch,
                      space + 4 * pitch,
                      space + 6 * pitch,
                      pitch};
  const size_t bytes = static_cast<size_t>(q.width) * sizeof(float);
  for (int64_t k = 0; k < 2; ++k) {
    for_float_type(
        q.dtype, [&]<class T>(T) { differentiate_tokens<T>(q, q.tensors[k], first, last, rows); });
    __builtin_memcpy(q.partial + (4 * task + k) * q.width, rows.grad_weight, bytes);
    __builtin_memcpy(q.partial + (4 * task + 2 + k) * q.width, rows.grad_bias, bytes);
  }
}

}  // namespace
}  // namespace patchgen_fast
