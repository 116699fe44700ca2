#include "calibration.h"

#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/isa.h"

namespace patchgen_fast::native {

extern const CalibrationLoops loops_baseline;
extern const CalibrationLoops loops_avx2;
extern const CalibrationLoops loops_avx512;
extern const CalibrationLoops loops_avx512_bf16;

namespace {

constexpr double kSampleSeconds =
    0.004;                             // shorter than a scheduler's slice, so that many pass whole
constexpr int kWarmUpRounds = 8;       // until the clock has settled
constexpr int kMaxBatches = 4;         // on a busy machine: of samples, until half of one is kept
constexpr double kUndisturbed = 1.02;  // wall over CPU time of a sample that kept its core

const CalibrationLoops& loops() {
  switch (chosen_isa().isa) {
#if defined(PATCHGEN_FAST_HAVE_AVX512_BF16)
    case Isa::avx512_bf16:
      return loops_avx512_bf16;
#endif
#if defined(PATCHGEN_FAST_HAVE_AVX512)
    case Isa::avx512:
      return loops_avx512;
#endif
#if defined(PATCHGEN_FAST_HAVE_AVX2)
    case Isa::avx2:
      return loops_avx2;
#endif
    default:
      return loops_baseline;
  }
}

double wall_seconds() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// What a loop returned goes here, so that the compiler cannot drop the loop.
std::atomic<uint64_t> g_sink{0};

void keep(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  g_sink.fetch_xor(bits, std::memory_order_relaxed);
}

// One thread's work: `work(repeats)` does `unit * repeats`.
struct Job {
  std::function<void(int64_t)> work;
  double unit;
};

struct Sample {
  double begin, end, cpu;
};

int64_t repeats_for(const Job& job, double seconds) {
  int64_t repeats = 1;
  for (;;) {
    const double begin = wall_seconds();
    job.work(repeats);
    const double took = wall_seconds() - begin;
    if (took > 0.2 * seconds) {
      return std::max<int64_t>(1,
                               static_cast<int64_t>(static_cast<double>(repeats) * seconds / took));
    }
    repeats *= 4;
  }
}

// Units per second of rounds, in which all threads work at the same time.
struct Rates {
  std::vector<double> whole;      // no thread lost its core
  std::vector<double> disturbed;  // some thread did
};

// Every thread does `rounds` rounds; they wait for each other before each. A round's time is first
// begin to last end.
void take(const std::vector<Job>& jobs, int64_t repeats, int rounds, Rates& rates) {
  const int threads = static_cast<int>(jobs.size());
  std::vector<std::vector<Sample>> taken(threads, std::vector<Sample>(rounds));
  std::atomic<int> arrived{0};

  auto run = [&](int thread) {
    for (int round = 0; round < rounds; ++round) {
      arrived.fetch_add(1);
      while (arrived.load() < threads * (round + 1)) {
        std::this_thread::yield();
      }
      Sample& sample = taken[thread][round];
      sample.begin = wall_seconds();
      const double cpu = cpu_seconds();
      jobs[thread].work(repeats);
      sample.cpu = cpu_seconds() - cpu;
      sample.end = wall_seconds();
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) {
    others.emplace_back(run, thread);
  }
  run(0);
  for (std::thread& other : others) {
    other.join();
  }

  double units = 0;
  for (const Job& job : jobs) {
    units += job.unit * static_cast<double>(repeats);
  }
  for (int round = 0; round < rounds; ++round) {
    double begin = taken[0][round].begin, end = taken[0][round].end;
    bool whole = true;
    for (int thread = 0; thread < threads; ++thread) {
      const Sample& sample = taken[thread][round];
      begin = std::min(begin, sample.begin);
      end = std::max(end, sample.end);
      whole &= sample.end - sample.begin <= kUndisturbed * sample.cpu;
    }
    (whole ? rates.whole : rates.disturbed).push_back(units / (end - begin));
  }
}

Measurement measure(const std::vector<Job>& jobs, int samples) {
  if (samples < 1) {
    throw std::invalid_argument("samples: expected 1 or more, got " + std::to_string(samples));
  }
  const int64_t repeats = repeats_for(jobs[0], kSampleSeconds);
  Rates warm_up, rates;
  take(jobs, repeats, kWarmUpRounds, warm_up);
  for (int batch = 0; batch < kMaxBatches; ++batch) {
    take(jobs, repeats, samples, rates);
    if (2 * rates.whole.size() >= static_cast<size_t>(samples)) {
      break;
    }
  }
  Measurement result;
  result.kept = static_cast<int>(rates.whole.size());
  result.discarded = static_cast<int>(rates.disturbed.size());
  result.disturbed = rates.whole.empty();
  std::vector<double>& used = result.disturbed ? rates.disturbed : rates.whole;
  std::sort(used.begin(), used.end());
  result.best = used.back();
  result.median = used[used.size() / 2];
  return result;
}

void check_threads(int threads) {
  if (threads < 1) {
    throw std::invalid_argument("threads: expected 1 or more, got " + std::to_string(threads));
  }
}

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(int64_t bytes) {
  void* pointer = nullptr;
  if (posix_memalign(&pointer, 4096, static_cast<size_t>(bytes)) != 0) {
    throw std::bad_alloc();
  }
  std::memset(pointer, 1, static_cast<size_t>(bytes));
  return Buffer(pointer);
}

}  // namespace

Measurement measure_arithmetic(Arithmetic kind, int threads, int samples) {
  check_threads(threads);
  const CalibrationLoops& table = loops();
  const bool bf16 = kind == Arithmetic::bf16 && table.bf16 != nullptr;
  const auto loop = bf16 ? table.bf16 : table.fp32;
  const double unit = static_cast<double>(bf16 ? table.bf16_flops : table.fp32_flops);
  const Job job{[loop](int64_t repeats) { keep(loop(repeats, 0.5F, 0.25F)); }, unit};
  return measure(std::vector<Job>(threads, job), samples);
}

Measurement measure_bandwidth(Traffic kind, int64_t bytes_per_thread, int threads, int samples) {
  check_threads(threads);
  constexpr int64_t kGrain = 4096;
  if (bytes_per_thread < 2 * kGrain) {
    throw std::invalid_argument("bytes_per_thread: expected 8192 or more, got " +
                                std::to_string(bytes_per_thread));
  }
  const CalibrationLoops& table = loops();
  std::vector<Buffer> buffers;
  std::vector<Job> jobs;
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t bytes = bytes_per_thread / (2 * kGrain) * (2 * kGrain);
    buffers.push_back(allocate(bytes));
    char* data = static_cast<char*>(buffers.back().get());
    if (kind == Traffic::read) {
      jobs.push_back({[=, &table](int64_t repeats) {
                        for (int64_t i = 0; i < repeats; ++i) {
                          g_sink.fetch_xor(table.read(data, bytes), std::memory_order_relaxed);
                        }
                      },
                      static_cast<double>(bytes)});
    } else {
      jobs.push_back({[=, &table](int64_t repeats) {
                        for (int64_t i = 0; i < repeats; ++i) {
                          table.copy(data + bytes / 2, data, bytes / 2);
                        }
                      },
                      static_cast<double>(bytes)});
    }
  }
  return measure(jobs, samples);
}

Measurement measure_clock(int samples) {
  constexpr int kChain = 64;  // additions a step: one cycle each, on every CPU of the last decade
  const Job job{[](int64_t repeats) {
                  uint64_t value = g_sink.load(std::memory_order_relaxed);
                  uint64_t addend = value | 1;
                  for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 64
                    for (int j = 0; j < kChain; ++j) {
                      value += addend;
                      asm volatile("" : "+r"(value), "+r"(addend));
                    }
                  }
                  g_sink.fetch_xor(value, std::memory_order_relaxed);
                },
                kChain};
  return measure({job}, samples);
}

}  // namespace patchgen_fast::native
