// Small helpers on sizes. Constexpr functions of the anonymous namespace, for the reason that
// kernels_isa.h gives.
#pragma once

#include <cstdint>

namespace patchgen_fast {
namespace {

constexpr int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}
constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

}  // namespace
}  // namespace patchgen_fast
