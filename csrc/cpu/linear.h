// Arguments of the linear kernels: plain pointers and sizes, free of torch.
#pragma once

#include "dtype.h"
#include "gemm.h"

namespace patchgen_fast {

enum class Activation : uint8_t { none, relu, gelu, gelu_tanh, silu };

// out = activation(input @ W^T + bias) + residual. Matrices are contiguous but for the strides of
// input and weight, which count elements from row to row.
struct LinearForward {
  int64_t rows, columns, depth;
  int64_t input_stride, weight_stride;
  Dtype dtype;
  Activation activation;
  bool depth_major;   // weight is [depth, columns] instead of [columns, depth]
  const void* input;  // [rows, depth]
  const void* weight;
  const void* bias;      // [columns] or null
  const void* residual;  // [rows, columns] or null
  void* packed;          // GemmPlan::packed_bytes, aligned to 64; not used for few rows
  void* out;             // [rows, columns]
  void* preactivation;   // what the activation was given, [rows, columns], or null
};

// A product of few rows as work for threads: a task owns all rows of some strips of columns.
struct FewRowsPlan {
  int64_t tasks;  // 0 where the product is not one of few rows, or is empty
  int64_t columns_per_task;
  int64_t stride;  // words from row to row of the gathered input
  size_t scratch_bytes;
};

// grad_pre = grad_out * activation'(preactivation), element by element.
struct ActivationBackward {
  int64_t elements;
  Dtype dtype;
  Activation activation;
  const void* grad_out;
  const void* preactivation;
  void* grad_pre;
};

constexpr int64_t kActivationChunk = 16 << 10;  // elements of one task

}  // namespace patchgen_fast
