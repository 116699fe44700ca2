// Rows of memory that are needed soon, brought into the second-level cache a few lines at a time.
//
// The rows of one attention head are far apart: hardware neither foresees them nor keeps enough
// misses under way. A burst of prefetches would itself wait for them; spread between the tiles of a
// product, which leave memory alone, they cost nothing.
#pragma once

#include "integers.h"

namespace patchgen_fast {
namespace {

// One row, at once.
template <bool kToWrite = false>
inline void bring_row(const void* row, int64_t bytes) {
  constexpr int64_t kLineBytes = 64;
  for (int64_t b = 0; b < bytes; b += kLineBytes) {
    __builtin_prefetch(static_cast<const char*>(row) + b, kToWrite, 2);
  }
}

// Many rows, bit by bit.
class Prefetch {
 public:
  // Appends `count` rows of `bytes` bytes, `stride` bytes apart.
  void add(const void* rows, int64_t stride, int64_t count, int64_t bytes) {
    if (count > 0) {
      queue_[ranges_++] = {static_cast<const char*>(rows), stride, count, bytes};
    }
  }

  void advance(int64_t lines = kLines) {
    while (ranges_ > next_ && lines-- > 0) {
      Range& range = queue_[next_];
      __builtin_prefetch(range.row + line_, 0, 2);
      line_ += kLineBytes;
      if (line_ >= range.bytes) {
        line_ = 0;
        range.row += range.stride;
        next_ += --range.count == 0;
      }
    }
  }

  // Brings in whatever is left.
  void finish() {
    advance(INT64_MAX);
    ranges_ = next_ = 0;
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  static constexpr int64_t kLines = 12;  // misses that a core has under way at once, halved
  struct Range {
    const char* row;
    int64_t stride, count, bytes;
  };
  Range queue_[8];
  int ranges_ = 0, next_ = 0;
  int64_t line_ = 0;  // offset within the current row
};

}  // namespace
}  // namespace patchgen_fast
