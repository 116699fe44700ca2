// Normalisation of queries and keys and rotary embedding, in one pass.
//
//     y = normalise(x) * weight + bias       over D: x / rms, or (x - mean) / deviation
//     out = y * cos + turn(y) * sin          turn: (a, b) to (-b, a), pairs of halves or of
//                                            neighbours
//
// A forward task owns kRopeTokens tokens of one image, all heads of query and key. A row of D
// elements is walked twice, for its statistics and for its result; between the walks it stays in
// L1, as the token's angles do between its heads. Bytes moved: every tensor once. A backward task
// owns kRopeBackwardTokens tokens of all images and heads, so that it alone owns their gradients of
// cos and sin even where these are shared; gradients of weights and biases are summed per token,
// then over the task and over all tasks, compensated and in order. Nothing depends on the threads.
#pragma once

#include "layer_norm_kernel.h"
#include "qk_norm_rope.h"

namespace patchgen_fast {
namespace {

// The partner of each element, with its sign: (turn y)[i...], from `load_y(i, left)`, which gives
// the vector of y at i. Vectors lie within one half of the row (for_each_vector).
struct Turn {
  bool interleaved;
  int64_t width;

  template <class LoadY>
  PATCHGEN_FAST_INLINE_MEMBER Vec turned(const LoadY& load_y, int64_t i, int64_t left) const {
    if (interleaved) {
      const Vec swapped = swap_lanes<1>(load_y(i, left), std::make_integer_sequence<int, kLanes>{});
      return select((iota() & 1) == 0, -swapped, swapped);
    }
    const int64_t half = width / 2;
    return i < half ? -load_y(i + half, left) : load_y(i - half, left);
  }

  // body(i, left): the row in vectors that do not cross its middle, unless neighbours are turned.
  template <class Body>
  PATCHGEN_FAST_INLINE_MEMBER void for_each_vector(const Body& body) const {
    const int64_t part = interleaved ? width : width / 2;
    for (int64_t first = 0; first < width; first += part) {
      for (int64_t i = 0; i < part; i += kLanes) {
        body(first + i, part - i);
      }
    }
  }
};

// One row of queries or keys, normalised as it is read.
template <class T>
struct RopeRow {
  const T* x;
  const float* weight;  // null: ones
  const float* bias;    // null: zeros
  RowStatistics statistics;

  RopeRow(const QkNormRope& q, const RotatedTensor& t, int64_t b, int64_t h, int64_t n)
      : x(static_cast<const T*>(t.x) + b * t.stride_b + h * t.stride_h + n * t.stride_n),
        weight(t.weight),
        bias(t.bias),
        statistics{0.0f, 1.0f} {
    if (q.norm != QkNorm::none) {
      statistics = row_statistics(x, q.width, q.eps, q.norm == QkNorm::layer);
    }
  }

  PATCHGEN_FAST_INLINE_MEMBER Vec normed(int64_t i, int64_t left) const {
    return (load_up_to(x + i, left) - statistics.mean) * statistics.rstd;
  }

  PATCHGEN_FAST_INLINE_MEMBER Vec affine(int64_t i, int64_t left) const {
    Vec y = normed(i, left);
    if (weight != nullptr) {
      y *= load_up_to(weight + i, left);
    }
    if (bias != nullptr) {
      y += load_up_to(bias + i, left);
    }
    return y;
  }
};

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
PATCHGEN_FAST_INLINE void rotate_row(const RopeRow<T>& row, const Turn& turn, Angles angles,
                                     T* out) {
  const auto load_y = [&](int64_t i, int64_t left) { return row.affine(i, left); };
  if (angles.cos == nullptr) {
    for (int64_t i = 0; i < turn.width; i += kLanes) {
      store_up_to(out + i, load_y(i, turn.width - i), turn.width - i);
    }
    return;
  }
  turn.for_each_vector([&](int64_t i, int64_t left) {
    const Vec turned = turn.turned(load_y, i, left) * load_up_to(angles.sin + i, left);
    store_up_to(out + i, fma(load_y(i, left), load_up_to(angles.cos + i, left), turned), left);
  });
}

template <class T>
static void rotate_tokens(const QkNormRope& q, const RotatedTensor& t, int64_t b, int64_t first,
                          int64_t last) {
  const Turn turn{q.interleaved, q.width};
  for (int64_t n = first; n < last; ++n) {
    for (int64_t h = 0; h < t.heads; ++h) {
      const RopeRow<T> row(q, t, b, h, n);
      rotate_row(row, turn, angles_of(q, b, h, n), result_row<T>(q, t, b, h, n));
    }
  }
}

// -- backward -------------------------------------------------------------------------------------

// Sums of a backward task: rows of floats, padded to whole vectors.
struct RopeSums {
  float* grad;          // not a sum: the gradient of one row before its rotation
  float* token_weight;  // of the gradients of weight and bias, over a token's heads
  float* token_bias;
  float* weight;  // over the task's tokens; each followed by what it has lost
  float* bias;
  int64_t pitch;

  RopeSums(void* scratch, int64_t width) : pitch(padded_width(width)) {
    grad = static_cast<float*>(scratch);
    token_weight = grad + pitch;
    token_bias = token_weight + pitch;
    weight = token_bias + pitch;
    bias = weight + 2 * pitch;
  }

  static int64_t floats(int64_t width) { return 7 * padded_width(width); }

  void clear() const {
    for (float* x = token_weight; x < bias + 2 * pitch; x += kLanes) {
      store(x, Vec{});
    }
  }

  void end_token() const {
    for (int64_t i = 0; i < pitch; i += kLanes) {
      add_compensated(weight + i, pitch, load(token_weight + i));
      add_compensated(bias + i, pitch, load(token_bias + i));
      store(token_weight + i, Vec{});
      store(token_bias + i, Vec{});
    }
  }
};

PATCHGEN_FAST_INLINE void add_to(float* sums, Vec x, int64_t left) {
  store_up_to(sums, load_up_to(sums, left) + x, left);
}

// The gradients of cos and sin, of one row: grad * y and grad * turn(y).
template <class T>
static void differentiate_angles(const RopeRow<T>& row, const T* grad, const Turn& turn,
                                 float* grad_cos, float* grad_sin) {
  const auto load_y = [&](int64_t i, int64_t left) { return row.affine(i, left); };
  turn.for_each_vector([&](int64_t i, int64_t left) {
    const Vec g = load_up_to(grad + i, left);
    add_to(grad_cos + i, g * load_y(i, left), left);
    add_to(grad_sin + i, g * turn.turned(load_y, i, left), left);
  });
}

// to = grad * cos - turn(grad * sin): the transpose of the rotation.
template <class T>
PATCHGEN_FAST_INLINE void rotate_back(const T* grad, const Turn& turn, Angles angles, float* to) {
  if (angles.cos == nullptr) {
    for (int64_t i = 0; i < turn.width; i += kLanes) {
      store_up_to(to + i, load_up_to(grad + i, turn.width - i), turn.width - i);
    }
    return;
  }
  const auto load_scaled = [&](int64_t i, int64_t left) {
    return load_up_to(grad + i, left) * load_up_to(angles.sin + i, left);
  };
  turn.for_each_vector([&](int64_t i, int64_t left) {
    const Vec turned = turn.turned(load_scaled, i, left);
    const Vec scaled = load_up_to(grad + i, left) * load_up_to(angles.cos + i, left);
    store_up_to(to + i, scaled - turned, left);
  });
}

// From the gradient of y, in sums.grad, to that of x; and its shares of the parameters' gradients.
template <class T>
PATCHGEN_FAST_INLINE void differentiate_norm(const QkNormRope& q, const RopeRow<T>& row,
                                             const RopeSums& sums, T* out) {
  Vec total{}, product{};
  for (int64_t i = 0; i < q.width; i += kLanes) {
    const int64_t left = q.width - i;
    const Vec normed = row.normed(i, left);
    Vec g = load_up_to(sums.grad + i, left);
    store(sums.token_weight + i, fma(g, normed, load(sums.token_weight + i)));
    store(sums.token_bias + i, load(sums.token_bias + i) + g);
    if (row.weight != nullptr) {
      g *= load_up_to(row.weight + i, left);
      store(sums.grad + i, g);
    }
    total += g;
    product = fma(g, normed, product);
  }
  const float inverse = 1.0f / static_cast<float>(q.width);
  const float mean = q.norm == QkNorm::layer ? sum_lanes(total) * inverse : 0.0f;
  const float mean_product = q.norm == QkNorm::none ? 0.0f : sum_lanes(product) * inverse;
  for (int64_t i = 0; i < q.width; i += kLanes) {
    const int64_t left = q.width - i;
    const Vec x = load(sums.grad + i) - mean - row.normed(i, left) * mean_product;
    store_up_to(out + i, x * row.statistics.rstd, left);
  }
}

template <class T>
static void differentiate_token(const QkNormRope& q, const RotatedTensor& t, int64_t b, int64_t n,
                                const RopeSums& sums) {
  const Turn turn{q.interleaved, q.width};
  for (int64_t h = 0; h < t.heads; ++h) {
    const RopeRow<T> row(q, t, b, h, n);
    const T* grad = static_cast<const T*>(t.grad) + b * t.grad_stride_b + h * t.grad_stride_h +
                    n * t.grad_stride_n;
    const Angles angles = angles_of(q, b, h, n);
    if (angles.cos != nullptr && q.grad_cos != nullptr) {
      const int64_t offset = b * q.grad_stride_b + h * q.grad_stride_h + (n - q.prefix) * q.width;
      differentiate_angles(row, grad, turn, q.grad_cos + offset, q.grad_sin + offset);
    }
    rotate_back(grad, turn, angles, sums.grad);
    differentiate_norm(q, row, sums, result_row<T>(q, t, b, h, n));
  }
  sums.end_token();
}

// -- the kernel table's entries -------------------------------------------------------------------

static void qk_norm_rope_forward(const QkNormRope& q, int64_t task) {
  const int64_t blocks = divide_up(q.tokens, kRopeTokens);
  const int64_t first = task % blocks * kRopeTokens;
  const int64_t last = smaller(q.tokens, first + kRopeTokens);
  for_float_type(q.dtype, [&]<class T>(T) {
    for (const RotatedTensor& t : q.tensors) {
      rotate_tokens<T>(q, t, task / blocks, first, last);
    }
  });
}

static size_t qk_norm_rope_scratch(int64_t width) {
  return static_cast<size_t>(RopeSums::floats(width)) * sizeof(float);
}

static void qk_norm_rope_backward(const QkNormRope& q, int64_t task, void* scratch) {
  const int64_t first = task * kRopeBackwardTokens;
  const int64_t last = smaller(q.tokens, first + kRopeBackwardTokens);
  const RopeSums sums(scratch, q.width);
  const size_t bytes = static_cast<size_t>(q.width) * sizeof(float);
  for (int64_t k = 0; k < 2; ++k) {
    sums.clear();
    for_float_type(q.dtype, [&]<class T>(T) {
      for (int64_t b = 0; b < q.batch; ++b) {
        for (int64_t n = first; n < last; ++n) {
          differentiate_token<T>(q, q.tensors[k], b, n, sums);
        }
      }
    });
    __builtin_memcpy(q.partial + (4 * task + k) * q.width, sums.weight, bytes);
    __builtin_memcpy(q.partial + (4 * task + 2 + k) * q.width, sums.bias, bytes);
  }
}

}  // namespace
}  // namespace patchgen_fast
