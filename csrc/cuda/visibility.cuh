// Where a head's rows lie, which keys a query sees, and the mask that is added to its scores.
#pragma once

#include "attention.h"
#include "tile.cuh"

namespace patchgen_fast::cuda {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float MINUS_INFINITY = -INFINITY;

// The first row of one head of one batch entry.
template <class T>
PATCHGEN_DEVICE const T* rows_of(const void* tensor, const Strides& stride, int batch, int head,
                                 int first_row = 0) {
  return static_cast<const T*>(tensor) + batch * stride.batch + head * stride.head +
         first_row * stride.row;
}
template <class T>
PATCHGEN_DEVICE T* rows_of(void* tensor, const Strides& stride, int batch, int head,
                           int first_row = 0) {
  return static_cast<T*>(tensor) + batch * stride.batch + head * stride.head +
         first_row * stride.row;
}

// The rows of one batch entry, or of one packed sequence.
struct Extent {
  int first_query, first_key, queries, keys;
};

PATCHGEN_DEVICE Extent whole_extent(const AttentionInputs& p) {
  return {0, 0, p.queries, p.keys};
}

// What no sequence owns: the results there are zeros.
PATCHGEN_DEVICE bool is_unowned(const AttentionInputs& p, int batch) {
  return p.packed.query_starts && batch == p.batch - 1;
}

PATCHGEN_DEVICE Extent extent_of(const AttentionInputs& p, int batch) {
  const Packed& packed = p.packed;
  if (!packed.query_starts) return whole_extent(p);
  auto start = [](const int32_t* starts, int s, int all) {
    return max_of(0, min_of(starts[s], all));
  };
  const int first_query = start(packed.query_starts, batch, packed.all_queries);
  const int first_key = start(packed.key_starts, batch, packed.all_keys);
  if (is_unowned(p, batch))
    return {first_query, first_key, packed.all_queries - first_query, packed.all_keys - first_key};
  const int queries = start(packed.query_starts, batch + 1, packed.all_queries) - first_query;
  const int keys = start(packed.key_starts, batch + 1, packed.all_keys) - first_key;
  return {first_query, first_key, max_of(0, min_of(queries, p.queries)),
          max_of(0, min_of(keys, p.keys))};
}

// Where the log-sum-exp of its first query lies.
PATCHGEN_DEVICE int64_t lse_row(const AttentionInputs& p, const Extent& extent, int batch,
                                int head) {
  if (p.packed.query_starts)
    return static_cast<int64_t>(head) * p.packed.all_queries + extent.first_query;
  return (static_cast<int64_t>(batch) * p.heads + head) * p.queries;
}

// Of one head of one batch entry. Lengths and offsets come from memory and are only clamped here:
// a kernel cannot raise.
struct Visibility {
  const char* mask;  // at this batch entry and head
  MaskKind kind;
  int64_t query_stride, key_stride;  // of the mask, in elements
  int queries, keys;                 // keys: kv_length of this batch entry
  int offset;                        // causal: query i sees keys up to i + offset
  bool causal;

  PATCHGEN_DEVICE Visibility(const AttentionInputs& p, const Extent& extent, int batch, int head)
      : kind(p.mask.kind),
        query_stride(p.mask.query_stride),
        key_stride(p.mask.key_stride),
        queries(extent.queries),
        keys(is_unowned(p, batch) ? 0 : extent.keys),
        offset(p.packed.query_starts ? keys - queries : 0),
        causal(p.causal) {
    int bytes = kind == MaskKind::BOOL ? 1 : kind == MaskKind::ELEMENT ? 2 : 4;
    mask = static_cast<const char*>(p.mask.data) +
           (batch * p.mask.batch_stride + head * p.mask.head_stride) * bytes;
    if (p.kv_lengths) keys = max_of(0, min_of(p.kv_lengths[batch], keys));
    if (p.query_offset) offset = max_of(-queries, min_of(p.query_offset[batch], p.keys));
  }

  // Keys from this one on are hidden from `query`. Grows with the query.
  PATCHGEN_DEVICE int limit(int query) const {
    return causal ? max_of(0, min_of(keys, query + offset + 1)) : keys;
  }
  // Where no query of a tile can see beyond.
  PATCHGEN_DEVICE int tile_limit(int first_query) const {
    return limit(min_of(first_query + TILE, queries) - 1);
  }
  // Whether some query of the tile at `first_query` is denied a key of the tile at `first_key`.
  PATCHGEN_DEVICE bool hides(int first_query, int first_key) const {
    return first_key + TILE > limit(first_query);
  }

  template <class T>
  PATCHGEN_DEVICE float masked(float logit, int query, int key) const {
    int64_t index = query * query_stride + key * key_stride;
    if (kind == MaskKind::BOOL)
      return reinterpret_cast<const uint8_t*>(mask)[index] ? logit : MINUS_INFINITY;
    if (kind == MaskKind::ELEMENT) return logit + to_float(reinterpret_cast<const T*>(mask)[index]);
    return logit + reinterpret_cast<const float*>(mask)[index];
  }
};

// How scores become logits. Scores stay raw products where they can, and the scale is joined with
// the change of base; with a mask, or a scale that is not positive (the greatest score is then not
// the greatest logit), they are scaled first. A mask of finfo.min must not be multiplied by
// log2(e), which would turn it into -inf: logits are in natural units.
struct LogitScale {
  float scale;
  bool scale_first;

  PATCHGEN_DEVICE explicit LogitScale(const AttentionInputs& p)
      : scale(p.scale), scale_first(p.mask.kind != MaskKind::NONE || !(p.scale > 0.f)) {}

  // A score times this is a natural logit.
  PATCHGEN_DEVICE float unit() const { return scale_first ? 1.f : scale; }
};

// Scores of the queries and keys from (first_query, first_key) on, to be taken times unit(): scale
// and mask applied, unseen keys at -inf. TRANSPOSED: rows of the square are keys, not queries.
template <class T, bool TRANSPOSED>
PATCHGEN_DEVICE void mask_scores(Square& scores, const Visibility& view, const LogitScale& logit,
                                 int first_query, int first_key, int lane) {
  bool hides = view.hides(first_query, first_key);
  if (!logit.scale_first && !hides) return;
  lane = opaque(lane);  // or the places of all keys in the mask are kept: three registers each
  PATCHGEN_UNROLL
  for (int n = 0; n < 2; ++n) PATCHGEN_UNROLL
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
    int query = first_query + (TRANSPOSED ? column : row);
    int key = first_key + (TRANSPOSED ? row : column);
    float score = scores[n][i];
    if (logit.scale_first) score *= logit.scale;
    bool seen = !hides || key < view.limit(query);
    if (view.kind != MaskKind::NONE && seen && query < view.queries)
      score = view.template masked<T>(score, query, key);
    scores[n][i] = seen ? score : MINUS_INFINITY;
  }
}

}  // namespace patchgen_fast::cuda
