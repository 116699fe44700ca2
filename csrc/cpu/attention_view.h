// One batch entry and key-value head of an attention problem: where its rows lie, what its queries
// see, and how its masks are applied.
#pragma once

#include "attention.h"
#include "attention_softmax.h"
#include "prefetch.h"

namespace patchgen_fast {
namespace {

// Consecutive query rows of one head.
struct QueryRows {
  int64_t head, query, rows;
};

// Consecutive keys of one key-value head.
struct KeyPanel {
  int64_t first, keys;
};

class HeadView {
 public:
  HeadView(const AttentionInputs& inputs, int64_t batch, int64_t kv_head)
      : inputs_(inputs), batch(batch), kv_head(kv_head) {
    length = inputs.keys;
    if (inputs.kv_lengths != nullptr) {
      length = larger(0, smaller(length, inputs.kv_lengths[batch]));
    }
    offset_ = inputs.query_offset == nullptr ? 0 : inputs.query_offset[batch];
    const float scale = inputs.scale;
    sign = scale == 0 ? 0.0f : scale < 0 ? -1.0f : 1.0f;
    additive = inputs.mask.data != nullptr && inputs.mask.dtype != Dtype::boolean;
    magnitude_ = scale == 0 ? 1.0f : scale < 0 ? -scale : scale;
    to_natural = additive ? 1.0f : magnitude_;
  }

  template <class Element>
  const Element* element(const AttentionTensor& tensor, int64_t head, int64_t token) const {
    return static_cast<const Element*>(tensor.data) + batch * tensor.batch + head * tensor.head +
           token * tensor.token;
  }

  // A result as the operands are described.
  AttentionTensor result(const void* data, int64_t heads, int64_t tokens) const {
    return {data, tokens * heads * inputs_.dim, inputs_.dim, heads * inputs_.dim};
  }

  // Has `count` rows of a head brought in.
  template <class Element>
  void bring(Prefetch& ahead, const AttentionTensor& tensor, int64_t head, int64_t token,
             int64_t count) const {
    constexpr int64_t kBytes = sizeof(Element);
    ahead.add(element<Element>(tensor, head, token), tensor.token * kBytes, count,
              inputs_.dim * kBytes);
  }

  // The same of two tensors' rows of a panel: share number `share` of `shares`.
  template <class Element>
  void bring_share(Prefetch& ahead, const AttentionTensor& keys, const AttentionTensor& values,
                   const KeyPanel& panel, int64_t share, int64_t shares) const {
    const int64_t most = divide_up(panel.keys, shares);
    const int64_t first = smaller(panel.keys, share * most);
    const int64_t count = smaller(most, panel.keys - first);
    bring<Element>(ahead, keys, kv_head, panel.first + first, count);
    bring<Element>(ahead, values, kv_head, panel.first + first, count);
  }

  // The panel's keys that lie within this batch entry's length.
  KeyPanel panel(int64_t first, int64_t keys) const {
    return {first, larger(0, smaller(keys, length - first))};
  }

  // How many keys of the panel a query sees, masks aside: always the first ones.
  int64_t visible(int64_t query, const KeyPanel& panel) const {
    const int64_t end = inputs_.is_causal ? query + offset_ + 1 - panel.first : panel.keys;
    return larger(0, smaller(panel.keys, end));
  }

  int64_t visible(const QueryRows& rows, const KeyPanel& panel) const {
    return visible(rows.query + rows.rows - 1, panel);
  }

  // How many of the panel's first keys all rows see, and without a mask.
  int64_t seen_by_all(const QueryRows& rows, const KeyPanel& panel) const {
    return inputs_.mask.data == nullptr ? visible(rows.query, panel) : 0;
  }

  // Applies masks, length and causality to sign * Q K^T. Times `to_natural`, the result is the
  // scores; with an additive mask it is the scores themselves.
  void mask(const QueryRows& rows, const KeyPanel& panel, float* scores, int64_t score_row) const {
    const AttentionMask& mask = inputs_.mask;
    const int64_t keys = visible(rows, panel);
    if (mask.data != nullptr) {
      const int64_t first = batch * mask.batch + rows.head * mask.head + rows.query * mask.query +
                            panel.first * mask.key;
      apply_mask(scores, score_row, rows.rows, keys, mask, first, magnitude_);
    }
    for (int64_t r = 0; r < rows.rows; ++r) {
      hide_keys_from(scores + r * score_row, visible(rows.query + r, panel),
                     divide_up(keys, kLanes));
    }
  }

 private:
  const AttentionInputs& inputs_;
  int64_t offset_;   // of the causal diagonal
  float magnitude_;  // of the scale; that of 0 counts as 1, with sign 0

 public:
  const int64_t batch, kv_head;
  int64_t length;  // keys of this batch entry
  float sign;      // of the scale, applied to the queries as they are packed
  float to_natural;
  bool additive;
};

}  // namespace
}  // namespace patchgen_fast
