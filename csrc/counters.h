// Call counters of the native kernels: which implementation ran is a fact that tests assert.
//
//     static CallCounter calls("attention.cpu");   // registers itself once
//     calls.add();                                  // one relaxed atomic add
//
// Python reads them through the extern "C" functions below (ctypes), without torch.
#pragma once

#include <atomic>
#include <cstdint>

#include "export.h"

namespace patchgen_fast {

class CallCounter {
 public:
  // `name` must outlive the program: pass a string literal.
  explicit CallCounter(const char* name);
  CallCounter(const CallCounter&) = delete;
  CallCounter& operator=(const CallCounter&) = delete;

  void add() { calls_.fetch_add(1, std::memory_order_relaxed); }

 private:
  friend struct CounterList;

  const char* name_;
  std::atomic<int64_t> calls_{0};
  CallCounter* next_ = nullptr;
};

}  // namespace patchgen_fast

extern "C" {
// Calls of the op overload `name` ("attention.cpu") so far; 0 if it never ran.
PATCHGEN_FAST_EXPORT int64_t patchgen_fast_call_count(const char* name);
// Name of the index-th counter, or null past the last one.
PATCHGEN_FAST_EXPORT const char* patchgen_fast_counter_name(int64_t index);
}
