// Layer normalisation, and the residual addition before it, in one pass.
//
//     sum = input + residual, rounded to its dtype
//     normalised = (sum - mean(sum)) * rstd * weight + bias,  rstd = 1 / sqrt(var(sum) + eps)
//
// One task owns kNormRows rows. A row (1.5 to 16 KiB) stays in L1 between its walks (add and mean,
// squares around the mean, normalise), so memory sees each tensor once. The variance is taken
// around the mean, not as a difference of squares, which cancels. The gradients of weight and bias
// are sums over kSummedRows rows in registers, then over the task and over all tasks, compensated
// and in order: they do not depend on the threads.
#pragma once

#include "gemm_sums_kernel.h"
#include "layer_norm.h"

namespace patchgen_fast {
namespace {

// Floats of a row, padded to whole vectors.
PATCHGEN_FAST_INLINE int64_t padded_width(int64_t width) {
  return round_up(width, 16);
}

// Calls body(i, left) for the vectors of [0, width); `left` is a constant but in the last one.
template <class Body>
PATCHGEN_FAST_INLINE void for_vectors(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    body(i, static_cast<int64_t>(kLanes));
  }
  if (i < width) {
    body(i, width - i);
  }
}

// Four vectors of sums, so that one addition does not wait for the last.
template <class Term>
PATCHGEN_FAST_INLINE float sum_over_row(int64_t width, const Term& term) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v) {
      sums[v] += term(i + v * kLanes, static_cast<int64_t>(kLanes));
    }
  }
  for (; i < width; i += kLanes) {
    sums[0] += term(i, width - i);
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// What is left of float32 numbers that are stored as T and loaded again.
template <class T>
PATCHGEN_FAST_INLINE Vec as_stored(Vec v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return from_bf16(to_bf16(v));
  } else if constexpr (std::is_same_v<T, Float16>) {
    return from_fp16(to_fp16(v));
  } else {
    return v;
  }
}

// Meanwhile the next row is brought in: the walks over a row in L1 leave memory alone.
template <class T, bool Adds>
static void add_and_normalise(const AddLayerNorm& n, int64_t row) {
  const int64_t offset = row * n.width;
  const T* input = static_cast<const T*>(n.input) + offset;
  const T* residual = Adds ? static_cast<const T*>(n.residual) + offset : nullptr;
  T* written = Adds ? static_cast<T*>(n.sum) + offset : nullptr;
  const T* sum = Adds ? written : input;
  T* to = static_cast<T*>(n.normalised) + offset;
  const int64_t next = row + 1 < n.rows ? n.width : 0;
  const float inverse = 1.0f / static_cast<float>(n.width);
  const float mean = inverse * sum_over_row(n.width, [&](int64_t i, int64_t left) {
                       const Vec x = load_up_to(input + i, left);
                       if constexpr (Adds) {
                         const Vec total = x + load_up_to(residual + i, left);
                         store_up_to(written + i, total, left);
                         return as_stored<T>(total);
                       } else {
                         return x;
                       }
                     });
  const float squares = sum_over_row(n.width, [&](int64_t i, int64_t left) {
    __builtin_prefetch(input + next + i, 0, 2);
    if constexpr (Adds) {
      __builtin_prefetch(residual + next + i, 0, 2);
    }
    Vec x = load_up_to(sum + i, left) - mean;
    if (left < kLanes) {  // lanes beyond the row hold -mean: they must not count
      x = select(iota() < static_cast<int32_t>(left), x, Vec{});
    }
    return x * x;
  });
  const float rstd = 1.0f / __builtin_sqrtf(squares * inverse + n.eps);
  n.mean[row] = mean;
  n.rstd[row] = rstd;
  for_vectors(n.width, [&](int64_t i, int64_t left) {
    if constexpr (Adds) {
      __builtin_prefetch(written + next + i, 1, 2);
    }
    __builtin_prefetch(to + next + i, 1, 2);
    Vec x = (load_up_to(sum + i, left) - mean) * rstd;
    if (n.weight != nullptr) {
      x *= load_up_to(n.weight + i, left);
    }
    if (n.bias != nullptr) {
      x += load_up_to(n.bias + i, left);
    }
    store_up_to(to + i, x, left);
  });
}

// -- backward -------------------------------------------------------------------------------------

constexpr int64_t kSummedRows = 8;

// One row of the backward's inputs.
template <class T>
struct NormRow {
  const T* grad;
  const T* sum;
  const float* weight;
  float mean, rstd;

  NormRow(const AddLayerNormBackward& n, int64_t row)
      : grad(static_cast<const T*>(n.grad_normalised) + row * n.width),
        sum(static_cast<const T*>(n.sum) + row * n.width),
        weight(n.weight),
        mean(n.mean[row]),
        rstd(n.rstd[row]) {}

  PATCHGEN_FAST_INLINE_MEMBER Vec normed(int64_t i, int64_t left) const {
    return (load_up_to(sum + i, left) - mean) * rstd;
  }
  // the gradient of normed
  PATCHGEN_FAST_INLINE_MEMBER Vec scaled(int64_t i, int64_t left) const {
    const Vec g = load_up_to(grad + i, left);
    return weight != nullptr ? g * load_up_to(weight + i, left) : g;
  }
};

// grad_total = (s - mean(s) - normed * mean(s * normed)) * rstd + grad_sum, s = grad * weight.
template <class T>
static void differentiate_row(const AddLayerNormBackward& n, int64_t row) {
  const NormRow<T> r(n, row);
  const float inverse = 1.0f / static_cast<float>(n.width);
  const float mean =
      inverse * sum_over_row(n.width, [&](int64_t i, int64_t left) { return r.scaled(i, left); });
  const float product = inverse * sum_over_row(n.width, [&](int64_t i, int64_t left) {
                          return r.scaled(i, left) * r.normed(i, left);
                        });
  const int64_t offset = row * n.width;
  T* to = static_cast<T*>(n.grad_total) + offset;
  const T* grad_sum = n.grad_sum == nullptr ? nullptr : static_cast<const T*>(n.grad_sum) + offset;
  for (int64_t i = 0; i < n.width; i += kLanes) {
    const int64_t left = n.width - i;
    Vec x = (r.scaled(i, left) - mean - r.normed(i, left) * product) * r.rstd;
    if (grad_sum != nullptr) {
      x += load_up_to(grad_sum + i, left);
    }
    store_up_to(to + i, x, left);
  }
}

// Adds the rows [first, last) to the sums of the gradients of weight and bias; each is followed,
// `pitch` floats on, by what it has lost.
template <class T>
static void add_parameter_gradients(const AddLayerNormBackward& n, int64_t first, int64_t last,
                                    float* grad_weight, float* grad_bias, int64_t pitch) {
  for (int64_t i = 0; i < n.width; i += kLanes) {
    Vec weight_sum{}, bias_sum{};
    for (int64_t row = first; row < last; ++row) {
      const NormRow<T> r(n, row);
      const Vec g = load_up_to(r.grad + i, n.width - i);
      weight_sum = fma(g, r.normed(i, n.width - i), weight_sum);
      bias_sum += g;
    }
    add_compensated(grad_weight + i, pitch, weight_sum);
    add_compensated(grad_bias + i, pitch, bias_sum);
  }
}

// -- the kernel table's entries -------------------------------------------------------------------

// Rows [task * kNormRows, ...).
static void add_layer_norm_forward(const AddLayerNorm& n, int64_t task) {
  const int64_t first = task * kNormRows;
  const int64_t last = smaller(n.rows, first + kNormRows);
  const auto rows = [&]<class T, bool Adds>(T, std::bool_constant<Adds>) {
    for (int64_t row = first; row < last; ++row) {
      add_and_normalise<T, Adds>(n, row);
    }
  };
  for_float_type(n.dtype, [&](auto element) {
    n.residual != nullptr ? rows(element, std::true_type{}) : rows(element, std::false_type{});
  });
}

static size_t add_layer_norm_scratch(int64_t width) {
  return static_cast<size_t>(4 * padded_width(width)) * sizeof(float);
}

static void add_layer_norm_backward(const AddLayerNormBackward& n, int64_t task, void* scratch) {
  const int64_t first = task * kNormRows;
  const int64_t last = smaller(n.rows, first + kNormRows);
  const int64_t pitch = padded_width(n.width);
  float* grad_weight = static_cast<float*>(scratch);
  float* grad_bias = grad_weight + 2 * pitch;
  for (int64_t i = 0; i < 4 * pitch; i += kLanes) {
    store(grad_weight + i, Vec{});
  }
  for_float_type(n.dtype, [&]<class T>(T) {
    for (int64_t row = first; row < last; row += kSummedRows) {
      const int64_t end = smaller(last, row + kSummedRows);
      for (int64_t r = row; r < end; ++r) {
        differentiate_row<T>(n, r);
      }
      add_parameter_gradients<T>(n, row, end, grad_weight, grad_bias, pitch);
    }
  });
  const size_t bytes = static_cast<size_t>(n.width) * sizeof(float);
  __builtin_memcpy(n.partial + 2 * task * n.width, grad_weight, bytes);
  __builtin_memcpy(n.partial + (2 * task + 1) * n.width, grad_bias, bytes);
}

}  // namespace
}  // namespace patchgen_fast
