// Arguments of the kernels that normalise and rotate queries and keys. Free of torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"
#include "integers.h"

namespace patchgen_fast {

enum class QkNorm : uint8_t { none, rms, layer };

// Queries or keys [B, heads, N, D], the last stride 1; results lie as [B, N, heads, D].
struct RotatedTensor {
  int64_t heads;
  const void* x;
  int64_t stride_b, stride_h, stride_n;
  const float* weight;  // [D] or null
  const float* bias;    // [D] or null
  void* out;            // forward: the result; backward: the gradient of x
  const void* grad;     // backward only: of the result
  int64_t grad_stride_b, grad_stride_h, grad_stride_n;
};

struct QkNormRope {
  int64_t batch, tokens, width;  // B, N, D
  Dtype dtype;
  QkNorm norm;
  float eps;
  bool interleaved;
  int64_t prefix;    // tokens at the front that are not rotated
  const float* cos;  // [B or 1, heads or 1, N - prefix, D], the last stride 1; null: no rotation
  const float* sin;  // likewise
  int64_t cos_stride_b, cos_stride_h, cos_stride_n;  // 0 along what is broadcast
  int64_t sin_stride_b, sin_stride_h, sin_stride_n;
  RotatedTensor tensors[2];  // query, key
  // backward
  float* grad_cos;  // contiguous, as cos, zeros; or null
  float* grad_sin;
  int64_t grad_stride_b, grad_stride_h;  // of both; 0 along what is broadcast
  float*
      partial;  // [tasks, 4, D]: each task's share of the gradients of q and k weight, q and k bias
  int64_t task_images, task_tokens;  // of a task

  // One image's tokens, or a few of all images where these share gradients that a task must own.
  void cut_tasks(bool by_token) {
    constexpr int64_t kTokens = 16, kTokensOfAllImages = 4;
    task_images = by_token ? larger(1, batch) : 1;
    task_tokens = by_token ? kTokensOfAllImages : kTokens;
  }
  int64_t tasks() const { return divide_up(batch, task_images) * divide_up(tokens, task_tokens); }
};

constexpr int64_t kRopeTokensAhead = 2;  // rows of so many tokens on are brought in

}  // namespace patchgen_fast
