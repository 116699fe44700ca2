// Arguments of the linear kernels: plain pointers and sizes, free of torch.
#pragma once

#include "dtype.h"
#include "gemm.h"

namespace patchgen_fast {

enum class Activation : uint8_t { none, relu, gelu, gelu_tanh, silu };

// out = activation(input @ W + bias) + residual. All matrices are contiguous.
struct LinearForward {
  int64_t rows, columns, depth;
  Dtype dtype;
  Activation activation;
  bool depth_major;   // weight is [depth, columns] instead of [columns, depth]
  const void* input;  // [rows, depth]
  const void* weight;
  const void* bias;      // [columns] or null
  const void* residual;  // [rows, columns] or null
  void* packed;          // GemmPlan::packed_bytes, aligned to 64
  void* out;             // [rows, columns]
  void* preactivation;   // what the activation was given, [rows, columns], or null
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
