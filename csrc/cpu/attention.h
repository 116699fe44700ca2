// Arguments of the attention kernels: pointers, element strides and sizes. No torch, no instruction
// set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace patchgen_fast {

// A [batch, head, token, dim] operand; the last dimension is contiguous. Strides count elements.
struct AttentionTensor {
  const void* data;
  int64_t batch;
  int64_t head;
  int64_t token;
};

// A mask over [batch, head, query, key]; a broadcast dimension has stride 0.
struct AttentionMask {
  const void* data;  // null: no mask
  Dtype dtype;       // boolean: true attends; otherwise added to the scaled scores
  int64_t batch;
  int64_t head;
  int64_t query;
  int64_t key;
};

// The inputs that forward and backward share.
struct AttentionInputs {
  Dtype dtype;
  int64_t batch, heads, kv_heads, queries, keys, dim;
  AttentionTensor query, key, value;
  AttentionMask mask;
  const int32_t* kv_lengths;    // [batch] or null
  const int32_t* query_offset;  // [batch] or null
  bool is_causal;
  float scale;
  int64_t lse_head;  // rows of lse, and of its gradient, from one head to the next

  // Where a row stands in lse.
  int64_t lse_row(int64_t entry, int64_t head, int64_t row) const {
    return (entry * heads + head) * lse_head + row;
  }
};

struct AttentionForward : AttentionInputs {
  void* out;   // [batch, queries, heads, dim], contiguous
  float* lse;  // [batch, heads, queries], natural logarithm
};

struct AttentionBackward : AttentionInputs {
  AttentionTensor out, grad_out;
  const float* lse;       // [batch, heads, queries]
  const float* grad_lse;  // likewise, or null
  void* grad_query;       // [batch, queries, heads, dim], contiguous
  void* grad_key;         // [batch, keys, kv_heads, dim], contiguous
  void* grad_value;       // likewise
  void* grad_mask;        // contiguous, in the mask's dtype and sizes; null: not asked for
  int64_t mask_batch, mask_heads, mask_queries, mask_keys;  // sizes of the mask, 1 where broadcast
  float* statistics;  // work space of the plan's size: two sums of each row; null if that is 0
};

// How a kernel's work is cut into tasks; made by the kernel's own instruction set.
struct AttentionPlan {
  int64_t tasks;
  int64_t chunk;         // blocks of query rows in one task
  int64_t chunks;        // tasks of one (batch, key-value head)
  size_t scratch_bytes;  // of each running thread
  int64_t workspace;     // floats that all tasks share
};

}  // namespace patchgen_fast
