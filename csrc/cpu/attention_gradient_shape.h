// How attention's gradients are cut into blocks of query rows, strips and panels of keys, and how
// a task's scratch is handed out.
#pragma once

#include "attention_view.h"

namespace patchgen_fast {
namespace {

constexpr int64_t kGradientRows = 96;  // most query rows of a block
constexpr int64_t kRowsTogether = 8;   // of the tiles of Q K^T and dO V^T: blocks are multiples
constexpr int64_t kStripRows = 16;     // of a strip: its scores and dP fit in the first-level cache
constexpr int64_t kGradientKeys = 256;      // most keys of a panel
constexpr int64_t kGradientFloats = 16384;  // most floats of a panel's operand: 64 KiB

template <class Math>
struct GradientShape {
  explicit GradientShape(const AttentionInputs& inputs)
      : steps(divide_up(inputs.dim, Math::kGroup)),
        query_row(round_up(steps, kLanes)),
        columns(round_up(inputs.dim, kLanes)),
        panels(larger(1, divide_up(inputs.keys, panel_limit(columns)))),
        panel(round_up(larger(1, divide_up(inputs.keys, panels)), kLanes)),
        score_row(panel + kLanes),
        blocks_per_head(divide_up(inputs.queries, kGradientRows)),
        rows(round_up(divide_up(inputs.queries, larger(1, blocks_per_head)), kRowsTogether)) {}

  static int64_t panel_limit(int64_t columns) {
    return smaller(kGradientKeys, larger(64, kGradientFloats / columns));
  }

  // Whether the rows' sums are to be measured before the gradients are computed.
  bool measured(const AttentionInputs& inputs) const {
    const bool additive = inputs.mask.data != nullptr && inputs.mask.dtype != Dtype::boolean;
    return panels > 1 && (additive || blocks_per_head == 1);
  }

  QueryRows block(int64_t head, int64_t index, int64_t queries) const {
    return {head, index * rows, smaller(rows, queries - index * rows)};
  }

  int64_t steps;      // of the products over dim, in units
  int64_t query_row;  // units of a packed row whose dims are steps
  int64_t columns;    // units of a packed row whose dims are lanes
  int64_t panels;
  int64_t panel;  // keys of a panel
  int64_t score_row;
  int64_t blocks_per_head;
  int64_t rows;  // of a block
};

// Hands out a task's scratch piece by piece; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<unsigned char*>(base)) {}

  float* floats(int64_t count) {
    unsigned char* here = base_ + bytes_;
    bytes_ += static_cast<size_t>(round_up(count * 4, 64));
    return reinterpret_cast<float*>(here);
  }

  size_t bytes() const { return bytes_; }

 private:
  unsigned char* base_;
  size_t bytes_ = 0;
};

}  // namespace
}  // namespace patchgen_fast
