// Rows of memory that are needed soon, brought into the second-level cache, unless said, a line at
// a time.
//
// The rows of one attention head are far apart: hardware neither foresees them nor keeps enough
// misses under way. A burst of prefetches would itself wait for them; one in each step of a
// product, whose multiplications leave most issue slots free, costs nothing.
#pragma once

#include "integers.h"
#include "simd.h"

namespace patchgen_fast {
namespace {

// To which cache, in the terms of __builtin_prefetch.
constexpr int kL1 = 3, kL2 = 2;

// One row, at once.
template <bool kToWrite = false, int kCache = kL2>
PATCHGEN_FAST_INLINE void bring_row(const void* row, int64_t bytes) {
  constexpr int64_t kLineBytes = 64;
  for (int64_t b = 0; b < bytes; b += kLineBytes) {
    __builtin_prefetch(static_cast<const char*>(row) + b, kToWrite, kCache);
  }
}

// The lines of rows that lie at equal distances, one after the other.
class LineWalk {
 public:
  // From byte `offset` of the first row on; it does not end with the last row.
  LineWalk(const char* row, int64_t offset, int64_t bytes, int64_t stride)
      : at_(row + offset),
        offset_(offset),
        last_((bytes - 1) / kLineBytes * kLineBytes),
        to_next_row_(stride - last_) {}

  // Without a branch, which would be mispredicted once a row.
  PATCHGEN_FAST_INLINE_MEMBER void bring_next() {
    __builtin_prefetch(at_, 0, 2);
    const int64_t within_row = (offset_ - last_) >> 63;  // all bits, or none
    at_ += to_next_row_ + ((kLineBytes - to_next_row_) & within_row);
    offset_ = (offset_ + kLineBytes) & within_row;
  }

  static constexpr int64_t kLineBytes = 64;

 private:
  const char* at_;
  int64_t offset_, last_, to_next_row_;
};

// Rows to bring in, a few lines with each product.
class Prefetch {
 public:
  // Appends `count` rows of `bytes` bytes, `stride` bytes apart.
  void add(const void* rows, int64_t stride, int64_t count, int64_t bytes) {
    if (count > 0) {
      queue_[ranges_++] = {static_cast<const char*>(rows), stride, count, bytes};
    }
  }

  bool any() const { return next_ < ranges_; }

  // The next lines, for a product of `steps` steps, if there are any. Where fewer are left of a
  // range, the walk goes on past its end: a hint that is wrong harms nothing, and a count in each
  // step would.
  LineWalk take(int64_t steps) {
    Range& range = queue_[next_];
    const LineWalk walk(range.row, line_ * LineWalk::kLineBytes, range.bytes, range.stride);
    const int64_t lines_a_row = divide_up(range.bytes, LineWalk::kLineBytes);
    const int64_t rows = (line_ + steps) / lines_a_row;
    line_ += steps - rows * lines_a_row;
    range.row += rows * range.stride;
    range.count -= rows;
    if (range.count <= 0) {
      ++next_;
      line_ = 0;
    }
    return walk;
  }

  // Brings in whatever is left.
  void finish() {
    while (any()) {
      const int64_t lines_a_row = divide_up(queue_[next_].bytes, LineWalk::kLineBytes);
      int64_t lines = queue_[next_].count * lines_a_row - line_;
      for (LineWalk walk = take(lines); lines > 0; --lines) {
        walk.bring_next();
      }
    }
    ranges_ = next_ = 0;
  }

 private:
  struct Range {
    const char* row;
    int64_t stride, count, bytes;
  };
  Range queue_[8];
  int ranges_ = 0, next_ = 0;
  int64_t line_ = 0;  // of the current row
};

}  // namespace
}  // namespace patchgen_fast
