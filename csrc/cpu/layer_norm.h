// Arguments of the layer-norm kernels: plain pointers and sizes, free of torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace patchgen_fast {

// sum = input + residual; normalised = (sum - mean) * rstd * weight + bias, over rows of `width`.
// Without a residual the sum is the input, and nothing is written to `sum`.
struct AddLayerNorm {
  int64_t rows, width;
  Dtype dtype;  // of input, residual, sum and normalised
  const void* input;
  const void* residual;  // or null
  const float* weight;   // [width] or null
  const float* bias;     // [width] or null
  float eps;
  void* normalised;
  void* sum;    // null without a residual
  float* mean;  // [rows]
  float* rstd;  // [rows]
};

struct AddLayerNormBackward {
  int64_t rows, width;
  Dtype dtype;  // of the gradients, of sum and of grad_total
  const void* grad_normalised;
  const void* grad_sum;  // or null
  const void* sum;
  const float* weight;  // or null
  const float* mean;
  const float* rstd;
  void* grad_total;
  float* partial;  // [tasks, 2, width]: each task's share of the gradients of weight and bias
};

constexpr int64_t kNormRows = 64;  // of one task

}  // namespace patchgen_fast
