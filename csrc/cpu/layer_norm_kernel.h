// Residual addition and layer normalisation in one pass.
//
//     sum = input + residual, rounded to its dtype
//     normalised = (sum - mean(sum)) * rstd * weight + bias,  rstd = 1 / sqrt(var(sum) + eps)
//
// One task owns kNormRows rows. A row (3 to 16 KiB) stays in L1 as floats between its three walks:
// add and sum, squares around the mean, normalise; memory sees each tensor once. The variance is
// taken around the mean, not as a difference of squares, which cancels. Gradients of weight and
// bias are summed per task and then over the tasks in order, so they do not depend on the threads.
#pragma once

#include "gemm_sums_kernel.h"
#include "layer_norm.h"

namespace patchgen_fast {
namespace {

// Floats of a row, padded to whole vectors.
PATCHGEN_FAST_INLINE int64_t padded_width(int64_t width) {
  return round_up(width, 16);
}

struct RowStatistics {
  float mean, rstd;
};

// Of the `width` floats at `row`, which is padded with zeros.
PATCHGEN_FAST_INLINE RowStatistics row_statistics(const float* row, int64_t width, float eps) {
  Vec sum{};
  for (int64_t i = 0; i < width; i += kLanes) {
    sum += load(row + i);
  }
  const float mean = sum_lanes(sum) / static_cast<float>(width);
  Vec squares{};
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec centred = load_up_to(row + i, width - i) - mean;
    // lanes beyond the row hold -mean: they must not count
    const Vec kept = width - i >= kLanes
                         ? centred
                         : select(iota() < static_cast<int32_t>(width - i), centred, Vec{});
    squares = fma(kept, kept, squares);
  }
  const float variance = sum_lanes(squares) / static_cast<float>(width);
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

template <class T>
static void add_and_normalise(const AddLayerNorm& n, int64_t row, float* buffer) {
  const int64_t offset = row * n.width;
  const T* input = static_cast<const T*>(n.input) + offset;
  const T* residual = static_cast<const T*>(n.residual) + offset;
  T* sum = static_cast<T*>(n.sum) + offset;
  for (int64_t i = 0; i < n.width; i += kLanes) {
    const int64_t left = n.width - i;
    const Vec added = load_up_to(input + i, left) + load_up_to(residual + i, left);
    store_up_to(sum + i, added, left);
    store(buffer + i, load_up_to(sum + i, left));
  }
  const RowStatistics statistics = row_statistics(buffer, n.width, n.eps);
  n.mean[row] = statistics.mean;
  n.rstd[row] = statistics.rstd;
  T* to = static_cast<T*>(n.normalised) + offset;
  for (int64_t i = 0; i < n.width; i += kLanes) {
    const int64_t left = n.width - i;
    Vec x = (load(buffer + i) - statistics.mean) * statistics.rstd;
    if (n.weight != nullptr) {
      x *= load_up_to(n.weight + i, left);
    }
    if (n.bias != nullptr) {
      x += load_up_to(n.bias + i, left);
    }
    store_up_to(to + i, x, left);
  }
}

// grad_total = (g - mean(g) - normed * mean(g * normed)) * rstd + grad_sum, g = grad * weight.
// `scaled` and `normed` are rows of floats in L1; so are the sums, each followed by what it has
// lost.
template <class T>
static void differentiate_row(const AddLayerNormBackward& n, int64_t row, float* scaled,
                              float* normed, float* grad_weight, float* grad_bias) {
  const int64_t offset = row * n.width;
  const T* grad = static_cast<const T*>(n.grad_normalised) + offset;
  const T* sum = static_cast<const T*>(n.sum) + offset;
  const float rstd = n.rstd[row];
  Vec sum_scaled{}, sum_product{};
  for (int64_t i = 0; i < n.width; i += kLanes) {
    const int64_t left = n.width - i;
    const Vec g = load_up_to(grad + i, left);
    const Vec x = (load_up_to(sum + i, left) - n.mean[row]) * rstd;
    add_compensated(grad_weight + i, padded_width(n.width), g * x);
    add_compensated(grad_bias + i, padded_width(n.width), g);
    const Vec s = n.weight != nullptr ? g * load_up_to(n.weight + i, left) : g;
    store(scaled + i, s);
    store(normed + i, x);
    sum_scaled += s;
    sum_product = fma(s, x, sum_product);
  }
  const float inverse = 1.0f / static_cast<float>(n.width);
  const float mean_scaled = sum_lanes(sum_scaled) * inverse;
  const float mean_product = sum_lanes(sum_product) * inverse;
  T* to = static_cast<T*>(n.grad_total) + offset;
  const T* grad_sum = n.grad_sum == nullptr ? nullptr : static_cast<const T*>(n.grad_sum) + offset;
  for (int64_t i = 0; i < n.width; i += kLanes) {
    const int64_t left = n.width - i;
    Vec x = (load(scaled + i) - mean_scaled - load(normed + i) * mean_product) * rstd;
    if (grad_sum != nullptr) {
      x += load_up_to(grad_sum + i, left);
    }
    store_up_to(to + i, x, left);
  }
}

// -- the kernel table's entries -------------------------------------------------------------------

static size_t add_layer_norm_scratch(int64_t width) {
  return static_cast<size_t>(6 * padded_width(width)) * sizeof(float);
}

// Rows [task * kNormRows, ...).
static void add_layer_norm_forward(const AddLayerNorm& n, int64_t task, void* scratch) {
  const int64_t first = task * kNormRows;
  const int64_t last = smaller(n.rows, first + kNormRows);
  for_float_type(n.dtype, [&]<class T>(T) {
    for (int64_t row = first; row < last; ++row) {
      add_and_normalise<T>(n, row, static_cast<float*>(scratch));
    }
  });
}

static void add_layer_norm_backward(const AddLayerNormBackward& n, int64_t task, void* scratch) {
  const int64_t first = task * kNormRows;
  const int64_t last = smaller(n.rows, first + kNormRows);
  const int64_t pitch = padded_width(n.width);
  float* buffers = static_cast<float*>(scratch);
  float* grad_weight = buffers + 2 * pitch;
  float* grad_bias = buffers + 4 * pitch;
  for (int64_t i = 0; i < 4 * pitch; i += kLanes) {
    store(grad_weight + i, Vec{});
  }
  for_float_type(n.dtype, [&]<class T>(T) {
    for (int64_t row = first; row < last; ++row) {
      differentiate_row<T>(n, row, buffers, buffers + pitch, grad_weight, grad_bias);
    }
  });
  const size_t bytes = static_cast<size_t>(n.width) * sizeof(float);
  __builtin_memcpy(n.partial + 2 * task * n.width, grad_weight, bytes);
  __builtin_memcpy(n.partial + (2 * task + 1) * n.width, grad_bias, bytes);
}

}  // namespace
}  // namespace patchgen_fast
