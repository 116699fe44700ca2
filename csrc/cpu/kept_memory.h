// Memory of large results, kept for the results to come.
//
// The C library hands a large block back to the system as soon as it is freed, and gets it again
// page by page: a page fault every 4 KiB, which can cost more than to compute what is written
// there. Blocks of dead results are therefore kept: a model that runs again finds the memory of its
// last run. All blocks together, of live and of dead results, take at most kept_limit() bytes. What
// is beyond is torch's allocator's: a training step's activations would else be mapped and unmapped
// each time, which costs more than the C library does.
#pragma once

#include <cstddef>

#include "../export.h"

namespace patchgen_fast {

// Smaller results are the C library's, which keeps small blocks itself.
constexpr size_t kLeastKept = size_t{256} << 10;

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};

// Advises 2 MiB pages for a large block that is not used yet: faulting these in takes a quarter of
// the time. They are still touched first by the thread that writes them.
void prefer_huge_pages(Block block);

// A block of at least `bytes`, uninitialised, aligned to a page; {nullptr, 0} where there is no
// room.
Block take_block(size_t bytes);

// Gives back a block that take_block gave, from any thread.
void return_block(Block block);

// The most bytes of all blocks, 0 if results are to be torch's own: as Python set
// it, or PATCHGEN_FAST_KEPT_MIB, or 256 MiB. std::invalid_argument for what is not a number.
size_t kept_limit();

}  // namespace patchgen_fast

extern "C" {
// Bytes of dead results that are kept now.
PATCHGEN_FAST_EXPORT size_t patchgen_fast_kept_bytes();
// Hands them to the system.
PATCHGEN_FAST_EXPORT void patchgen_fast_empty_cache();
// Another limit, in bytes, from now on; returns the one before, for the next call. SIZE_MAX is the
// limit of the environment.
PATCHGEN_FAST_EXPORT size_t patchgen_fast_set_kept_limit(size_t bytes);
}
