// Element types that kernels read and write. Plain structs: no torch, no instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace patchgen_fast {

enum class Dtype : uint8_t { float32, bfloat16, float16, uint8, boolean };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

constexpr size_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return 4;
    case Dtype::bfloat16:
    case Dtype::float16:
      return 2;
    default:
      return 1;
  }
}

}  // namespace patchgen_fast
