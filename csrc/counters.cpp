#include "counters.h"

#include <cstring>

namespace patchgen_fast {

// An intrusive list that only grows: counters are static, so nodes never go away and readers need
// no lock.
struct CounterList {
  static std::atomic<CallCounter*>& head() {
    static std::atomic<CallCounter*> first{nullptr};
    return first;
  }

  static void push(CallCounter* counter) {
    CallCounter* first = head().load(std::memory_order_relaxed);
    do {
      counter->next_ = first;
    } while (!head().compare_exchange_weak(first, counter, std::memory_order_release,
                                           std::memory_order_relaxed));
  }

  // Two counters may share a name (one op in two files): their calls add up.
  static int64_t count(const char* name) {
    int64_t total = 0;
    for (const CallCounter* c = first(); c != nullptr; c = c->next_) {
      if (std::strcmp(c->name_, name) == 0) {
        total += c->calls_.load(std::memory_order_relaxed);
      }
    }
    return total;
  }

  static const char* name(int64_t index) {
    const CallCounter* c = first();
    while (c != nullptr && index-- > 0) {
      c = c->next_;
    }
    return c == nullptr ? nullptr : c->name_;
  }

 private:
  static const CallCounter* first() { return head().load(std::memory_order_acquire); }
};

CallCounter::CallCounter(const char* name) : name_(name) {
  CounterList::push(this);
}

}  // namespace patchgen_fast

int64_t patchgen_fast_call_count(const char* name) {
  return patchgen_fast::CounterList::count(name);
}

const char* patchgen_fast_counter_name(int64_t index) {
  return index < 0 ? nullptr : patchgen_fast::CounterList::name(index);
}
