#include "handover.h"

#if defined(__linux__)
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>
#endif

namespace patchgen_fast::native {

#if defined(__linux__)
namespace {

constexpr int kExchanges = 300;

bool stay_on(int cpu) {
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(cpu, &only);
  return sched_setaffinity(0, sizeof only, &only) == 0;  // of the calling thread
}

std::vector<int> usable_cpus() {
  cpu_set_t mine;
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof mine, &mine) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &mine)) {
        cpus.push_back(cpu);
      }
    }
  }
  return cpus;
}

// The two threads take turns: one waits for odd numbers, the other for even ones.
struct Exchange {
  alignas(128) std::atomic<int> turn{0};
  alignas(128) std::atomic<bool> impossible{false};

  void wait_for(int number) const {
    while (turn.load(std::memory_order_acquire) != number) {
    }
  }
};

}  // namespace

double measure_handover(int samples) {
  const std::vector<int> cpus = usable_cpus();
  if (cpus.size() < 2) {
    return 0;
  }
  using Clock = std::chrono::steady_clock;
  Exchange exchange;
  double best = 0;
  std::thread first([&] {
    if (!stay_on(cpus[0])) {
      exchange.impossible = true;
    }
    for (int s = 0; s < samples; ++s) {
      const int start = 2 * kExchanges * s;
      const Clock::time_point before = Clock::now();
      for (int i = 0; i < kExchanges; ++i) {
        exchange.turn.store(start + 2 * i + 1, std::memory_order_release);
        exchange.wait_for(start + 2 * i + 2);
      }
      const double taken = std::chrono::duration<double>(Clock::now() - before).count();
      best = s == 0 ? taken : std::min(best, taken);
    }
  });
  std::thread second([&] {
    if (!stay_on(cpus[1])) {
      exchange.impossible = true;
    }
    for (int i = 0; i < samples * kExchanges; ++i) {
      exchange.wait_for(2 * i + 1);
      exchange.turn.store(2 * i + 2, std::memory_order_release);
    }
  });
  first.join();
  second.join();
  return exchange.impossible ? 0 : best / (2 * kExchanges);
}

#else

double measure_handover(int) {
  return 0;
}

#endif

}  // namespace patchgen_fast::native
