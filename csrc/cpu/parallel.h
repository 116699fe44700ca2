// How kernels are spread over threads, without naming a threading library.
//
// The boundary passes torch's parallel_for, which obeys torch.set_num_threads; a test passes a
// plain loop. Each thread starts with its own share of the tasks, always the same run of them, so
// that what one operator wrote is read by the next on the core that has it in its cache; then it
// takes over what slower threads have left. Results never depend on who ran a task, as each task
// owns its outputs.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace patchgen_fast {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction,
                             void* context);

struct Parallel {
  ParallelFor run;
  int64_t threads;
};

// Runs everything on the calling thread.
inline void serial_for(int64_t begin, int64_t end, int64_t, RangeFunction body, void* context) {
  body(begin, end, context);
}

// Memory of the calling thread for one use, kept between calls unless it is larger than `Kept`
// bytes: a fresh large block costs a page fault every 4 KiB, and in a virtual machine whose host
// takes back what is free, more than the kernels' own work. Aligned to 64 bytes, uninitialised.
template <class Use, size_t Kept>
class ThreadMemory {
 public:
  static void* get(size_t bytes) {
    thread_local ThreadMemory mine;
    return mine.grow(bytes);
  }

  ~ThreadMemory() { std::free(data_); }

 private:
  void* grow(size_t bytes) {
    const bool oversized = size_ > Kept && bytes <= Kept;
    if (bytes > size_ || oversized) {
      std::free(data_);
      size_ = 0;
      const size_t rounded = (bytes + 63) / 64 * 64;
      data_ = std::aligned_alloc(64, rounded);
      if (data_ == nullptr) {
        throw std::bad_alloc();
      }
      size_ = rounded;
    }
    return data_;
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

// What a task works in.
using Scratch = ThreadMemory<struct ForTasks, size_t{8} << 20>;

// Calls body(task, scratch) for every task in [0, tasks), each once, on up to parallel.threads
// threads; `scratch` is the running thread's own, of at least scratch_bytes.
template <class Body>
void for_each_task(const Parallel& parallel, int64_t tasks, size_t scratch_bytes,
                   const Body& body) {
  constexpr int64_t kMaxShares = 64;
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Shared {
    Share shares[kMaxShares];
    int64_t count, workers;
    size_t scratch_bytes;
    const Body* body;
  } shared;
  const int64_t workers = tasks < parallel.threads ? tasks : parallel.threads;
  shared.count = workers < kMaxShares ? workers : kMaxShares;
  shared.workers = workers;
  shared.scratch_bytes = scratch_bytes;
  shared.body = &body;
  for (int64_t i = 0; i < shared.count; ++i) {
    shared.shares[i].next.store(tasks * i / shared.count, std::memory_order_relaxed);
    shared.shares[i].end = tasks * (i + 1) / shared.count;
  }
  const auto work = [](int64_t index, int64_t, void* context) {
    auto* s = static_cast<Shared*>(context);
    void* scratch = Scratch::get(s->scratch_bytes);
    const int64_t own = index * s->count / s->workers;
    for (int64_t i = 0; i < s->count; ++i) {
      Share& share = s->shares[(own + i) % s->count];
      int64_t task = share.next.fetch_add(1, std::memory_order_relaxed);
      for (; task < share.end; task = share.next.fetch_add(1, std::memory_order_relaxed)) {
        (*s->body)(task, scratch);
      }
    }
  };
  if (workers == 1) {
    work(0, 1, &shared);
  } else if (workers > 1) {
    parallel.run(0, workers, 1, work, &shared);
  }
}

}  // namespace patchgen_fast
