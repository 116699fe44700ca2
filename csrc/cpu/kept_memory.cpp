#include "kept_memory.h"

#include <sys/mman.h>

#include <atomic>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace patchgen_fast {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kMostMiB = SIZE_MAX / kMiB - 1;
constexpr size_t kGranule = size_t{64} << 10;  // sizes that differ by less share blocks

// A block that nobody found a use for during so many deaths of results goes, if another size needs
// its place: a model that runs no more. Sooner, and models with more results than there is room for
// would map and unmap them in every run.
constexpr uint64_t kStale = 4096;

// The mapped blocks: those of dead results, the oldest first, and what all of them take, live ones
// too. Nobody waits for the lock: who does not get it goes to torch, or unmaps, as if nothing were
// kept. So a forked process cannot hang on a lock whose holder it lacks.
class KeptBlocks {
 public:
  // Of the smallest dead blocks of at least `bytes` that are at most a quarter larger, the last to
  // die, whose lines may be in the cache; or none.
  Block take(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) {
      return {};
    }
    size_t best = dead_.size();
    for (size_t i = 0; i < dead_.size(); ++i) {
      const size_t size = dead_[i].block.bytes;
      if (size >= bytes && size - bytes <= bytes / 4 &&
          (best == dead_.size() || size <= dead_[best].block.bytes)) {
        best = i;
      }
    }
    return remove(best);
  }

  // The oldest dead block if it is stale, else none; any counts as stale where `all`.
  Block take_stale(bool all = false) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    const bool found =
        lock.owns_lock() && !dead_.empty() && (all || deaths_ - dead_.front().died > kStale);
    return found ? remove(0) : Block{};
  }

  bool put(Block block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) {
      return false;
    }
    dead_.push_back({block, ++deaths_});
    dead_bytes_ += block.bytes;
    return true;
  }

  // Whether `bytes` more may be mapped; they then count as such.
  bool reserve(size_t bytes, size_t limit) {
    size_t mapped = mapped_.load();
    while (mapped + bytes <= limit) {
      if (mapped_.compare_exchange_weak(mapped, mapped + bytes)) {
        return true;
      }
    }
    return false;
  }

  void release(size_t bytes) { mapped_ -= bytes; }

  size_t dead_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return dead_bytes_;
  }

 private:
  struct Dead {
    Block block;
    uint64_t died;  // as how many-th
  };

  Block remove(size_t index) {
    if (index >= dead_.size()) {
      return {};
    }
    const Block block = dead_[index].block;
    dead_.erase(dead_.begin() + static_cast<std::ptrdiff_t>(index));
    dead_bytes_ -= block.bytes;
    return block;
  }

  std::mutex mutex_;
  std::vector<Dead> dead_;
  uint64_t deaths_ = 0;
  size_t dead_bytes_ = 0;
  std::atomic<size_t> mapped_{0};
};

// Never destroyed: results outlive static objects where an interpreter ends without a clean-up.
KeptBlocks& kept() {
  static KeptBlocks* blocks = new KeptBlocks;
  return *blocks;
}

// Mapped, not allocated: the C library's heap would be held open by what is kept in it. None where
// the system has none to give.
Block map_block(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    kept().release(bytes);
    return {};
  }
  const Block block{data, bytes};
  prefer_huge_pages(block);
  return block;
}

void unmap(Block block) {
  munmap(block.data, block.bytes);
  kept().release(block.bytes);
}

size_t limit_of_environment() {
  const char* text = std::getenv("PATCHGEN_FAST_KEPT_MIB");
  if (text == nullptr || *text == '\0') {
    return 256 * kMiB;
  }
  const std::string number(text);
  size_t mib = 0;
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), mib);
  if (error != std::errc() || end != number.data() + number.size() || mib > kMostMiB) {
    throw std::invalid_argument(
        "PATCHGEN_FAST_KEPT_MIB: expected a whole number of MiB (0: nothing "
        "is kept); got '" +
        number + "'");
  }
  return mib * kMiB;
}

constexpr size_t kOfEnvironment = SIZE_MAX;
std::atomic<size_t> limit_set{kOfEnvironment};

}  // namespace

size_t kept_limit() {
  const size_t limit = limit_set.load(std::memory_order_relaxed);
  if (limit != kOfEnvironment) {
    return limit;
  }
  static const size_t of_environment = limit_of_environment();
  return of_environment;
}

void prefer_huge_pages(Block block) {
#if defined(MADV_HUGEPAGE)
  constexpr size_t kWorthwhile = 8 * kMiB;
  constexpr uintptr_t kPage = 4096;
  if (block.bytes >= kWorthwhile) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(block.data);
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
    const uintptr_t last = (begin + block.bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may be refused
  }
#else
  (void)block;
#endif
}

Block take_block(size_t bytes) {
  const Block block = kept().take(bytes);
  if (block.data != nullptr) {
    return block;
  }
  const size_t rounded = (bytes + kGranule - 1) / kGranule * kGranule;
  while (!kept().reserve(rounded, kept_limit())) {
    const Block stale = kept().take_stale();
    if (stale.data == nullptr) {
      return {};
    }
    unmap(stale);
  }
  return map_block(rounded);
}

void return_block(Block block) {
  if (!kept().put(block)) {
    unmap(block);
  }
}

}  // namespace patchgen_fast

size_t patchgen_fast_kept_bytes() {
  return patchgen_fast::kept().dead_bytes();
}

size_t patchgen_fast_set_kept_limit(size_t bytes) {
  return patchgen_fast::limit_set.exchange(bytes);
}

void patchgen_fast_empty_cache() {
  using patchgen_fast::kept;
  while (true) {
    const patchgen_fast::Block dead = kept().take_stale(true);
    if (dead.data == nullptr) {
      return;
    }
    patchgen_fast::unmap(dead);
  }
}
