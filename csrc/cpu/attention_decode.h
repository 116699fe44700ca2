// Arguments of the attention kernel for few queries.
#pragma once

#include "attention.h"

namespace patchgen_fast {

struct AttentionDecode : AttentionForward {
  // Running maxima, sums and outputs of each split of the keys, [batch, kv_heads, splits], of the
  // plan's size; null if that is 0: then nothing is split.
  float* partial;

  // The most query rows of a key-value head for which streaming the keys is faster than copying
  // them into tiles: with more of them the sums over lanes cost more than the copy.
  static constexpr int64_t kMostRows = 16;

  static bool takes(const AttentionForward& problem) {
    const int64_t most = problem.dtype == Dtype::bfloat16 ? kMostRows / 2 : kMostRows;
    return problem.kv_heads > 0 && problem.queries > 0 &&
           problem.queries * (problem.heads / problem.kv_heads) <= most;
  }

  // Threads worth waking: each reads 64 KiB of keys and values at least.
  static int64_t useful_threads(const AttentionForward& problem, int64_t threads) {
    const int64_t bytes = 2 * problem.batch * problem.kv_heads * problem.keys * problem.dim *
                          static_cast<int64_t>(size_of(problem.dtype));
    const int64_t most = 1 + (bytes >> 16);
    return threads < most ? threads : most;
  }
};

}  // namespace patchgen_fast
