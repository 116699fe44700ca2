// The softmax of whole rows that lie in registers: one pass, nothing is rescaled.
#pragma once

#include "visibility.cuh"

namespace patchgen_fast::cuda {

// Over the four lanes that share a row of an accumulator.
PATCHGEN_DEVICE float row_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
PATCHGEN_DEVICE float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Of rows lane/4 (index 0) and lane/4 + 8 (index 1).
struct RowStatistics {
  float greatest[2];  // natural logit; -inf for an empty row
  float sum[2];       // of exp(logit - greatest)

  PATCHGEN_DEVICE float inverse_sum(int half) const {
    return sum[half] > 0.f ? 1.f / sum[half] : 0.f;  // an empty row gives 0
  }
  PATCHGEN_DEVICE float log_sum_exp(int half) const {
    return sum[half] > 0.f ? greatest[half] + logf(sum[half]) : MINUS_INFINITY;
  }
};

// Turns scores into exp(logit - greatest of the row), rounded to T as left operands of the product
// with the values; the sum is taken before rounding. Absent keys have scores of -inf; branching
// around their exponentials would cost more in registers than it saves.
template <class T, int TILES>
PATCHGEN_DEVICE RowStatistics softmax_rows(uint32_t (&weights)[TILES][4], Square (&scores)[TILES],
                                           const LogitScale& logit) {
  RowStatistics row;
  float shift[2];
  const float to_log2 = logit.unit() * LOG2_E;
  PATCHGEN_UNROLL
  for (int half = 0; half < 2; ++half) {
    float greatest = MINUS_INFINITY;
    PATCHGEN_UNROLL
    for (int t = 0; t < TILES; ++t) PATCHGEN_UNROLL
    for (int n = 0; n < 2; ++n)
      greatest = fmaxf(greatest, fmaxf(scores[t][n][2 * half], scores[t][n][2 * half + 1]));
    greatest = row_max(greatest);
    row.greatest[half] = greatest * logit.unit();
    float finite = greatest == MINUS_INFINITY ? 0.f : greatest;
    shift[half] = finite * to_log2;
    if (logit.scale_first) {
      // Subtracted before the change of base, where logits of finfo.min would overflow.
      PATCHGEN_UNROLL
      for (int t = 0; t < TILES; ++t) PATCHGEN_UNROLL
      for (int n = 0; n < 2; ++n) {
        scores[t][n][2 * half] -= finite;
        scores[t][n][2 * half + 1] -= finite;
      }
      shift[half] = 0.f;
    }
  }
  row.sum[0] = row.sum[1] = 0.f;
  PATCHGEN_UNROLL
  for (int t = 0; t < TILES; ++t) {
    PATCHGEN_UNROLL
    for (int n = 0; n < 2; ++n) PATCHGEN_UNROLL
    for (int i = 0; i < 4; ++i) {
      float weight = exp2_approx(fmaf(scores[t][n][i], to_log2, -shift[i / 2]));
      row.sum[i / 2] += weight;
      scores[t][n][i] = weight;
    }
    to_left_operand<T>(weights[t], scores[t]);
  }
  PATCHGEN_UNROLL
  for (int half = 0; half < 2; ++half) row.sum[half] = row_sum(row.sum[half]);
  return row;
}

}  // namespace patchgen_fast::cuda
