// Arguments of sums over the rows of a matrix: gradients of biases and positions. Free of torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace patchgen_fast {

// sums[column] = x[0, column] + x[1, column] + ... in float.
struct ColumnSums {
  int64_t rows, columns;
  int64_t stride;  // elements from row to row
  Dtype dtype;
  const void* x;
  float* sums;  // [columns]
};

constexpr int64_t kSumColumns = 512;  // of one task

}  // namespace patchgen_fast
