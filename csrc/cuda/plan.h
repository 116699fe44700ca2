// How a kernel is launched: shared by the launchers and by the host tests, so that the tests run
// the very instances, grids and sizes that a GPU would.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "dtype.h"

namespace patchgen_fast::cuda {

inline const char* name_of(DType dtype) {
  constexpr const char* NAMES[] = {"bf16", "fp16", "fp32", "uint8", "bool"};
  return NAMES[static_cast<int>(dtype)];
}

// An instance of a kernel: what errors and `patchgen-fast info --kernels` call it, with the
// template arguments in their order.
struct Instance {
  const char* kernel;
  DType dtype;
  int first, second = 0;      // widths, tiles, pixels together; 0: none
  DType pixel = DType::BOOL;  // of patch embedding; BOOL: none

  std::string name() const {
    std::string text = std::string(kernel) + "<";
    if (pixel != DType::BOOL) text += std::string(name_of(pixel)) + ", ";
    text += name_of(dtype);
    if (first) text += ", " + std::to_string(first);
    if (second) text += ", " + std::to_string(second);
    return text + ">";
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
