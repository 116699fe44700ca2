// Normalisation of queries and keys and rotary embedding, in one pass.
//
//     y = normalise(x) * weight + bias       over D: x / rms, or (x - mean) / deviation
//     out = y * cos + turn(y) * sin          turn: (a, b) to (-b, a), pairs of halves or of
//                                            neighbours
//
// A task owns kRopeTokens tokens of one image, all heads of query and key; in a backward that also
// gives gradients of cos and sin, a few tokens of all images, so that it alone owns these even
// where images share them. kLanes heads of a token go together: their rows are walked once for all
// their statistics, whose sums over lanes are then taken of all rows at once, and once for their
// results. Between the walks they stay in L1, as the token's angles do; rows of a later token are
// brought in meanwhile. Bytes moved: every tensor once. Gradients of weights and biases are summed
// per token, then over the task and over all tasks, compensated and in order. Nothing depends on
// the threads.
#pragma once

#include "layer_norm_kernel.h"
#include "prefetch.h"
#include "qk_norm_rope.h"

namespace patchgen_fast {
namespace {

// The images and tokens of a task.
struct RopeTask {
  int64_t first_image, last_image, first_token, last_token;

  RopeTask(const QkNormRope& q, int64_t task) {
    const int64_t blocks = divide_up(q.tokens, q.task_tokens);
    first_image = task / blocks * q.task_images;
    last_image = smaller(q.batch, first_image + q.task_images);
    first_token = task % blocks * q.task_tokens;
    last_token = smaller(q.tokens, first_token + q.task_tokens);
  }
};

// The rotation of a row: its angles, and which elements are turned into each other.
struct Rotation {
  const float* cos;  // null: a prefix token, left alone
  const float* sin;
  bool interleaved;
  int64_t width;
};

// (a, b) to (-b, a), of neighbours.
PATCHGEN_FAST_INLINE Vec turn_neighbours(Vec y) {
  const Vec swapped = swap_lanes<1>(y, std::make_integer_sequence<int, kLanes>{});
  return select((iota() & 1) == 0, -swapped, swapped);
}

// y * cos + turn(y) * sin of a whole row: `load_y(i, left)` gives vectors of it, each asked for
// once, and `store_out(i, left, v)` takes the result. `backward`: y * cos - turn(y * sin), the
// transpose.
template <bool kBackward, class LoadY, class StoreOut>
PATCHGEN_FAST_INLINE void rotate(const Rotation& r, const LoadY& load_y,
                                 const StoreOut& store_out) {
  const auto cos = [&](int64_t i, int64_t left) { return load_up_to(r.cos + i, left); };
  const auto sin = [&](int64_t i, int64_t left) { return load_up_to(r.sin + i, left); };
  if (r.cos == nullptr) {
    for_vectors(r.width, [&](int64_t i, int64_t left) { store_out(i, left, load_y(i, left)); });
  } else if (r.interleaved) {
    for_vectors(r.width, [&](int64_t i, int64_t left) {
      const Vec y = load_y(i, left), s = sin(i, left);
      const Vec turned = kBackward ? -turn_neighbours(y * s) : turn_neighbours(y) * s;
      store_out(i, left, fma(y, cos(i, left), turned));
    });
  } else {
    const int64_t half = r.width / 2;
    for_vectors(half, [&](int64_t i, int64_t left) {
      const int64_t j = half + i;
      const Vec a = load_y(i, left), b = load_y(j, left);
      const Vec sin_a = sin(i, left), sin_b = sin(j, left);
      store_out(i, left, fma(a, cos(i, left), kBackward ? b * sin_b : -b * sin_a));
      store_out(j, left, fma(b, cos(j, left), kBackward ? -a * sin_a : a * sin_b));
    });
  }
}

// Means and 1 / deviations of up to kLanes rows.
struct HeadStatistics {
  float mean[kLanes], rstd[kLanes];
};

// Of `rows` rows, `stride` elements apart.
template <class T>
PATCHGEN_FAST_INLINE HeadStatistics head_statistics(const T* x, int64_t stride, int64_t rows,
                                                    const QkNormRope& q) {
  HeadStatistics statistics;
  Vec mean{}, rstd = broadcast(1.0f);
  const float inverse = 1.0f / static_cast<float>(q.width);
  // lane r: the sum of term(vector, left, r) over row r
  const auto sum_rows = [&](const auto& term) {
    Vec sums[kLanes] = {};
    for (int64_t r = 0; r < rows; ++r) {
      Vec sum{};
      for_vectors(q.width, [&](int64_t i, int64_t left) {
        sum += term(load_up_to(x + r * stride + i, left), left, r);
      });
      sums[r] = sum;
    }
    return join_lanes<1>(sums);
  };
  store(statistics.mean, mean);
  if (q.norm == QkNorm::layer) {
    mean = inverse * sum_rows([](Vec v, int64_t, int64_t) { return v; });
    store(statistics.mean, mean);
    rstd = sum_rows([&](Vec v, int64_t left, int64_t r) {
      // lanes beyond the row hold -mean: they must not count
      const VecInt within = iota() < static_cast<int32_t>(left);
      const Vec around = select(within, v - statistics.mean[r], Vec{});
      return around * around;
    });
  } else if (q.norm == QkNorm::rms) {
    rstd = sum_rows([](Vec v, int64_t, int64_t) { return v * v; });
  }
  if (q.norm != QkNorm::none) {
    rstd = 1.0f / square_root(rstd * inverse + q.eps);
  }
  store(statistics.rstd, rstd);
  return statistics;
}

// One row of queries or keys, normalised as it is read.
template <class T>
struct RopeRow {
  const T* x;
  const float* weight;  // null: ones
  const float* bias;    // null: zeros
  float mean, rstd;

  PATCHGEN_FAST_INLINE_MEMBER Vec normed(int64_t i, int64_t left) const {
    return (load_up_to(x + i, left) - mean) * rstd;
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

// Heads [first, first + rows) of a token: up to kLanes of them.
template <class T>
struct HeadGroup {
  const RotatedTensor& tensor;
  const T* x;
  int64_t rows;
  HeadStatistics statistics;

  HeadGroup(const QkNormRope& q, const RotatedTensor& t, int64_t b, int64_t first, int64_t n)
      : tensor(t),
        x(static_cast<const T*>(t.x) + b * t.stride_b + first * t.stride_h + n * t.stride_n),
        rows(smaller(kLanes, t.heads - first)),
        statistics(head_statistics(x, t.stride_h, rows, q)) {}

  PATCHGEN_FAST_INLINE_MEMBER RopeRow<T> row(int64_t r) const {
    return {x + r * tensor.stride_h, tensor.weight, tensor.bias, statistics.mean[r],
            statistics.rstd[r]};
  }
};

PATCHGEN_FAST_INLINE Rotation rotation_of(const QkNormRope& q, int64_t b, int64_t h, int64_t n) {
  if (q.cos == nullptr || n < q.prefix) {
    return {nullptr, nullptr, q.interleaved, q.width};
  }
  n -= q.prefix;
  return {q.cos + b * q.cos_stride_b + h * q.cos_stride_h + n * q.cos_stride_n,
          q.sin + b * q.sin_stride_b + h * q.sin_stride_h + n * q.sin_stride_n, q.interleaved,
          q.width};
}

template <class T>
PATCHGEN_FAST_INLINE T* result_row(const QkNormRope& q, const RotatedTensor& t, int64_t b,
                                   int64_t h, int64_t n) {
  return static_cast<T*>(t.out) + ((b * q.tokens + n) * t.heads + h) * q.width;
}

// -- forward --------------------------------------------------------------------------------------

template <class T>
static void rotate_tokens(const QkNormRope& q, const RotatedTensor& t, int64_t b, int64_t first,
                          int64_t last) {
  const int64_t bytes = q.width * static_cast<int64_t>(sizeof(T));
  for (int64_t n = first; n < last; ++n) {
    for (int64_t h = 0; h < t.heads; h += kLanes) {
      const HeadGroup<T> group(q, t, b, h, n);
      for (int64_t r = 0; r < group.rows; ++r) {
        const RopeRow<T> row = group.row(r);
        bring_row(row.x + kRopeTokensAhead * t.stride_n, bytes);
        T* out = result_row<T>(q, t, b, h + r, n);
        rotate<false>(
            rotation_of(q, b, h + r, n),
            [&](int64_t i, int64_t left) { return row.affine(i, left); },
            [&](int64_t i, int64_t left, Vec v) { store_up_to(out + i, v, left); });
      }
    }
  }
}

// -- backward -------------------------------------------------------------------------------------

PATCHGEN_FAST_INLINE void add_to(float* sums, Vec x, int64_t left) {
  store_up_to(sums, load_up_to(sums, left) + x, left);
}

// Sums of a backward task: rows of floats, padded to whole vectors.
struct RopeSums {
  float* grad;          // not sums: gradients of kLanes rows before their normalisation
  float* token_weight;  // of the gradients of weight and bias, over a token's heads
  float* token_bias;
  float* group_cos;  // of the gradients of cos and sin, over heads that share them
  float* group_sin;
  float* weight;  // over the task's tokens; each followed by what it has lost
  float* bias;
  int64_t pitch;

  RopeSums(void* scratch, int64_t width) : pitch(padded_width(width)) {
    grad = static_cast<float*>(scratch);
    token_weight = grad + kLanes * pitch;
    token_bias = token_weight + pitch;
    group_cos = token_bias + pitch;
    group_sin = group_cos + pitch;
    weight = group_sin + pitch;
    bias = weight + 2 * pitch;
  }

  static int64_t floats(int64_t width) { return (kLanes + 8) * padded_width(width); }

  void clear() const {
    for (float* x = token_weight; x < bias + 2 * pitch; x += kLanes) {
      store(x, Vec{});
    }
  }

  void end_group(float* grad_cos, float* grad_sin, int64_t width) const {
    for_vectors(width, [&](int64_t i, int64_t left) {
      add_to(grad_cos + i, load(group_cos + i), left);
      add_to(grad_sin + i, load(group_sin + i), left);
      store(group_cos + i, Vec{});
      store(group_sin + i, Vec{});
    });
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

// The gradients of cos and sin, of one row: grad * y and grad * turn(y).
template <class T>
static void differentiate_angles(const RopeRow<T>& row, const T* grad, const Rotation& r,
                                 float* grad_cos, float* grad_sin) {
  const int64_t half = r.width / 2;
  const auto add = [&](int64_t i, int64_t left, Vec y, Vec turned) {
    const Vec g = load_up_to(grad + i, left);
    add_to(grad_cos + i, g * y, left);
    add_to(grad_sin + i, g * turned, left);
  };
  if (r.interleaved) {
    for_vectors(r.width, [&](int64_t i, int64_t left) {
      const Vec y = row.affine(i, left);
      add(i, left, y, turn_neighbours(y));
    });
  } else {
    for_vectors(half, [&](int64_t i, int64_t left) {
      const Vec a = row.affine(i, left), b = row.affine(half + i, left);
      add(i, left, a, -b);
      add(half + i, left, b, a);
    });
  }
}

// From the gradients of a group's rows of y, in sums.grad, to those of x; and their shares of the
// parameters' gradients.
template <class T>
static void differentiate_norm(const QkNormRope& q, const HeadGroup<T>& group, const RopeSums& sums,
                               const RotatedTensor& t, int64_t b, int64_t h, int64_t n) {
  Vec totals[kLanes] = {}, products[kLanes] = {};
  for (int64_t r = 0; r < group.rows; ++r) {
    const RopeRow<T> row = group.row(r);
    float* grad = sums.grad + r * sums.pitch;
    Vec total{}, product{};
    for_vectors(q.width, [&](int64_t i, int64_t left) {
      const Vec normed = row.normed(i, left);
      Vec g = load_up_to(grad + i, left);
      add_to(sums.token_weight + i, g * normed, left);
      add_to(sums.token_bias + i, g, left);
      if (row.weight != nullptr) {
        g *= load_up_to(row.weight + i, left);
        store_up_to(grad + i, g, left);
      }
      total += g;
      product = fma(g, normed, product);
    });
    totals[r] = total;
    products[r] = product;
  }
  float means[kLanes] = {}, mean_products[kLanes] = {};
  const float inverse = 1.0f / static_cast<float>(q.width);
  if (q.norm == QkNorm::layer) {
    store(means, join_lanes<1>(totals) * inverse);
  }
  if (q.norm != QkNorm::none) {
    store(mean_products, join_lanes<1>(products) * inverse);
  }
  for (int64_t r = 0; r < group.rows; ++r) {
    const RopeRow<T> row = group.row(r);
    const float* grad = sums.grad + r * sums.pitch;
    T* out = result_row<T>(q, t, b, h + r, n);
    for_vectors(q.width, [&](int64_t i, int64_t left) {
      const Vec g = load_up_to(grad + i, left);
      const Vec x = g - means[r] - row.normed(i, left) * mean_products[r];
      store_up_to(out + i, x * row.rstd, left);
    });
  }
}

template <class T>
static void differentiate_token(const QkNormRope& q, const RotatedTensor& t, int64_t b, int64_t n,
                                const RopeSums& sums) {
  const int64_t bytes = q.width * static_cast<int64_t>(sizeof(T));
  for (int64_t h = 0; h < t.heads; h += kLanes) {
    const HeadGroup<T> group(q, t, b, h, n);
    const T* grads = static_cast<const T*>(t.grad) + b * t.grad_stride_b + h * t.grad_stride_h +
                     n * t.grad_stride_n;
    const bool shared = q.grad_stride_h == 0;
    const int64_t table = b * q.grad_stride_b + h * q.grad_stride_h + (n - q.prefix) * q.width;
    for (int64_t r = 0; r < group.rows; ++r) {
      const RopeRow<T> row = group.row(r);
      const T* grad = grads + r * t.grad_stride_h;
      bring_row(row.x + kRopeTokensAhead * t.stride_n, bytes);
      bring_row(grad + kRopeTokensAhead * t.grad_stride_n, bytes);
      bring_row<true>(result_row<T>(q, t, b, h + r, n + kRopeTokensAhead), bytes);
      const Rotation rotation = rotation_of(q, b, h + r, n);
      if (rotation.cos != nullptr && q.grad_cos != nullptr) {
        const int64_t own = table + r * q.grad_stride_h;
        differentiate_angles(row, grad, rotation, shared ? sums.group_cos : q.grad_cos + own,
                             shared ? sums.group_sin : q.grad_sin + own);
      }
      float* to = sums.grad + r * sums.pitch;
      rotate<true>(
          rotation, [&](int64_t i, int64_t left) { return load_up_to(grad + i, left); },
          [&](int64_t i, int64_t left, Vec v) { store_up_to(to + i, v, left); });
    }
    if (shared && q.grad_cos != nullptr && n >= q.prefix) {
      sums.end_group(q.grad_cos + table, q.grad_sin + table, q.width);
    }
    differentiate_norm(q, group, sums, t, b, h, n);
  }
  sums.end_token();
}

// -- the kernel table's entries -------------------------------------------------------------------

static void qk_norm_rope_forward(const QkNormRope& q, int64_t task) {
  const RopeTask owned(q, task);
  for_float_type(q.dtype, [&]<class T>(T) {
    for (const RotatedTensor& t : q.tensors) {
      rotate_tokens<T>(q, t, owned.first_image, owned.first_token, owned.last_token);
    }
  });
}

static size_t qk_norm_rope_scratch(int64_t width) {
  return static_cast<size_t>(RopeSums::floats(width)) * sizeof(float);
}

static void qk_norm_rope_backward(const QkNormRope& q, int64_t task, void* scratch) {
  const RopeTask owned(q, task);
  const RopeSums sums(scratch, q.width);
  const size_t bytes = static_cast<size_t>(q.width) * sizeof(float);
  for (int64_t k = 0; k < 2; ++k) {
    sums.clear();
    for_float_type(q.dtype, [&]<class T>(T) {
      for (int64_t b = owned.first_image; b < owned.last_image; ++b) {
        for (int64_t n = owned.first_token; n < owned.last_token; ++n) {
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
