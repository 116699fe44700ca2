#include "kept_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

namespace patchgen_fast {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kMostMiB = SIZE_MAX / kMiB - 1;
constexpr size_t kGranule = size_t{64} << 10;  // sizes that differ by less share blocks

// Mapped, not allocated: the C library's heap would be held open by what is kept in it.
Block map_block(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    throw std::bad_alloc();
  }
  const Block block{data, bytes};
  prefer_huge_pages(block);
  return block;
}

void unmap(Block block) {
  munmap(block.data, block.bytes);
}

// Blocks of dead results, the oldest first. Nobody waits for the lock: who does not get it maps or
// unmaps as if nothing were kept. So a forked process cannot hang on a lock whose holder it lacks.
class KeptBlocks {
 public:
  // The smallest block of at least `bytes` that is at most a quarter larger, or none.
  Block take(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) {
      return {};
    }
    size_t best = count_;
    for (size_t i = 0; i < count_; ++i) {
      const size_t size = blocks_[i].bytes;
      if (size >= bytes && size - bytes <= bytes / 4 &&
          (best == count_ || size < blocks_[best].bytes)) {
        best = i;
      }
    }
    return remove(best);
  }

  // The oldest block where there is no room for one of `bytes`, else none.
  Block make_room(size_t bytes, size_t limit) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    return lock.owns_lock() && !has_room(bytes, limit) ? remove(0) : Block{};
  }

  bool put(Block block, size_t limit) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || !has_room(block.bytes, limit)) {
      return false;
    }
    blocks_[count_++] = block;
    bytes_ += block.bytes;
    return true;
  }

  size_t bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }

 private:
  bool has_room(size_t bytes, size_t limit) const {
    return bytes_ + bytes <= limit && count_ < blocks_.size();
  }

  Block remove(size_t index) {
    if (index >= count_) {
      return {};
    }
    const Block block = blocks_[index];
    std::copy(blocks_.begin() + index + 1, blocks_.begin() + count_, blocks_.begin() + index);
    --count_;
    bytes_ -= block.bytes;
    return block;
  }

  std::mutex mutex_;
  std::array<Block, 64> blocks_;
  size_t count_ = 0;
  size_t bytes_ = 0;
};

// Never destroyed: results outlive static objects where an interpreter ends without a clean-up.
KeptBlocks& kept() {
  static KeptBlocks* blocks = new KeptBlocks;
  return *blocks;
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
  return block.data != nullptr ? block : map_block((bytes + kGranule - 1) / kGranule * kGranule);
}

void return_block(Block block) {
  const size_t limit = kept_limit();
  if (block.bytes <= limit) {
    while (true) {
      const Block oldest = kept().make_room(block.bytes, limit);
      if (oldest.data == nullptr) {
        break;
      }
      unmap(oldest);
    }
    if (kept().put(block, limit)) {
      return;
    }
  }
  unmap(block);
}

}  // namespace patchgen_fast

size_t patchgen_fast_kept_bytes() {
  return patchgen_fast::kept().bytes();
}

size_t patchgen_fast_set_kept_limit(size_t bytes) {
  return patchgen_fast::limit_set.exchange(bytes);
}

void patchgen_fast_empty_cache() {
  using patchgen_fast::kept;
  while (true) {
    const patchgen_fast::Block oldest = kept().make_room(1, 0);
    if (oldest.data == nullptr) {
      return;
    }
    patchgen_fast::unmap(oldest);
  }
}
