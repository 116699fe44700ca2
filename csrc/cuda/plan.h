// How a kernel is launched: shared by the launchers and by the host tests, so that the tests run
// the very instances, grids and sizes that a GPU would.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "dtype.h"

namespace patchgen_fast::cuda {

// An instance of a kernel: what errors and `patchgen-fast info --kernels` call it.
struct Instance {
  const char* kernel;
  DType dtype;
  int width;  // elements of a row that its tiles are made for
  int tiles;  // a bound on tiles of 16 along the other side, or 0

  std::string name() const {
    std::string text = std::string(kernel) + "<" + (dtype == DType::BFLOAT16 ? "bf16" : "fp16") +
                       ", " + std::to_string(width);
    return text + (tiles ? ", " + std::to_string(tiles) + ">" : ">");
  }
};

// A kernel as a type, so that a launcher can keep what it knows of each.
template <auto* FUNCTION>
struct Kernel {};

struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes;
};

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls use(Constant<W>) with the least width that holds a row: 72 and 80 are served as they are.
// PATCHGEN_FEWER_INSTANCES, for a quick build under a sanitizer, leaves one of each choice.
template <class Use>
void with_width([[maybe_unused]] int head_dim, Use&& use) {
#if !defined(PATCHGEN_FEWER_INSTANCES)
  if (head_dim <= 32) return use(Constant<32>{});
  if (head_dim <= 64) return use(Constant<64>{});
  if (head_dim > 96) return use(Constant<128>{});
  if (head_dim > 80) return use(Constant<96>{});
  if (head_dim > 72) return use(Constant<80>{});
#endif
  return use(Constant<72>{});
}

}  // namespace patchgen_fast::cuda
