// What an attention kernel is asked to do. Neither torch nor CUDA is needed to read this.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace patchgen_fast::cuda {

// In elements; the elements of a row are adjacent.
struct Strides {
  int64_t batch, head, row;
};

enum class MaskKind : int {
  NONE,
  BOOL,     // true attends
  ELEMENT,  // added, of the query's dtype
  FLOAT32,  // added
};

// Read as [batch, heads, queries, keys]; the stride of a broadcast dimension is 0.
struct Mask {
  const void* data;
  MaskKind kind;
  int64_t batch_stride, head_stride, query_stride, key_stride;
};

// Sequences packed one after another instead of a batch, where `query_starts` is not null. Sequence
// s is rows starts[s] to starts[s + 1] of its tensor; `queries` and `keys` are then the longest
// sequence's, `batch` is sequences + 1 (the last is the rows that no sequence owns), and batch
// strides are 0. Causal is bottom-right: query i sees keys up to i + keys - queries.
struct Packed {
  const int32_t* query_starts;  // [batch]
  const int32_t* key_starts;    // [batch]
  int all_queries, all_keys;    // rows of the tensors
};

// Query i of batch b sees key j iff the mask allows it, j < kv_lengths[b], and, when causal,
// j <= i + query_offset[b].
struct AttentionInputs {
  const void* query;  // [batch, heads, queries, head_dim]
  const void* key;    // [batch, kv_heads, keys, head_dim]
  const void* value;  // [batch, kv_heads, keys, head_dim]
  Strides query_stride, key_stride, value_stride;
  Mask mask;
  const int32_t* kv_lengths;    // [batch], or null: all keys
  const int32_t* query_offset;  // [batch], or null: 0
  Packed packed;
  int batch, heads, kv_heads, queries, keys, head_dim;
  DType dtype;  // of query, key and value: BFLOAT16 or FLOAT16
  bool causal;
  float scale;
};

struct AttentionForward : AttentionInputs {
  void* out;  // [batch, heads, queries, head_dim]
  Strides out_stride;
  float* lse;  // [batch, heads, queries], packed [heads, all_queries], contiguous; natural
               // logarithm, -inf for an empty row
};

// Up to so many queries are taken as a step of generation: any number of keys, split among blocks.
constexpr int FEW_QUERIES = 8;

// Where blocks of the same rows leave what the last of them joins; null with one split.
struct DecodeWork {
  float* partial;     // [row tiles, splits, 16, width + 2]: output, then greatest, then sum
  unsigned* tickets;  // [row tiles], zeros
  int splits;
};

struct DecodeSize {
  int splits;
  int64_t partial_floats, tickets;
};

struct AttentionBackward : AttentionInputs {
  const void* out;  // as the forward wrote them
  const float* lse;
  const void* grad_out;   // [batch, heads, queries, head_dim]
  const float* grad_lse;  // as lse, or null
  Strides out_stride, grad_out_stride;
  void* grad_query;  // the gradients have the shapes and dtypes of what they are gradients of
  void* grad_key;
  void* grad_value;
  Strides grad_query_stride, grad_key_stride, grad_value_stride;
};

// The kernels hold whole rows of scores in registers, and one head's keys and values in shared
// memory; both bound the count of keys.
constexpr int SHORT_SEQUENCE = 272;

// ---- launchers: no synchronisation, no allocation; `stream` is a cudaStream_t of `device`. They
// throw std::runtime_error with the kernel's name, the shape and the remedy.
void launch_attention_forward(const AttentionForward& problem, int device, void* stream);
void launch_attention_decode(const AttentionForward& problem, const DecodeWork& work, int device,
                             void* stream);
DecodeSize attention_decode_size(const AttentionInputs& problem, int device);
void launch_attention_backward(const AttentionBackward& problem, int device, void* stream);

}  // namespace patchgen_fast::cuda
