// The calibration loops for the instruction set that the compiler's flags name; calibrate_<isa>.cpp
// sets PATCHGEN_FAST_LOOPS and includes this file, once. Internal linkage throughout: csrc/cpu's
// kernels_isa.h says why.
//
// Vectors are the compiler's own (`vector_size`), so that the same loops serve every architecture;
// multiply and add become one instruction where the set has it.
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "calibration.h"

namespace patchgen_fast::native {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kSums = 24;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kSums = 12;  // of 16
#else
constexpr int kVectorBytes = 16;
constexpr int kSums = 12;
#endif

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Words __attribute__((vector_size(kVectorBytes), may_alias));
constexpr int kLanes = kVectorBytes / sizeof(float);
constexpr int kRounds = 8;  // multiply-adds of each sum in a step: hides the loop's own cost

// Different from each other: equal ones the compiler would compute once.
void start(Floats (&sums)[kSums]) {
  for (int i = 0; i < kSums; ++i) {
    sums[i] = Floats{} + static_cast<float>(i);
  }
}

float total(const Floats (&sums)[kSums]) {
  float result = 0;
  for (const Floats& sum : sums) {
    for (int lane = 0; lane < kLanes; ++lane) {
      result += sum[lane];
    }
  }
  return result;
}

// Enough independent sums to fill every unit over the latency of a multiply-add (4 or 5 cycles, at
// two a cycle). sum = sum * factor + addend stays near addend / (1 - factor): no overflow, no
// denormals.
float fp32(int64_t steps, float factor, float addend) {
  const Floats factors = Floats{} + factor;
  const Floats addends = Floats{} + addend;
  Floats sums[kSums];
  start(sums);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 8
    for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 24
      for (int i = 0; i < kSums; ++i) {
        sums[i] = sums[i] * factors + addends;
      }
    }
  }
  return total(sums);
}

#if defined(__AVX512BF16__)
// The instruction adds a pair of products to its sum: the sum grows slowly and never overflows.
float bf16(int64_t steps, float factor, float addend) {
  const __m512bh factors = _mm512_cvtne2ps_pbh(_mm512_set1_ps(factor), _mm512_set1_ps(factor));
  const __m512bh addends = _mm512_cvtne2ps_pbh(_mm512_set1_ps(addend), _mm512_set1_ps(addend));
  Floats sums[kSums];
  start(sums);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 8
    for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 24
      for (int i = 0; i < kSums; ++i) {
        sums[i] = _mm512_dpbf16_ps(sums[i], factors, addends);
      }
    }
  }
  return total(sums);
}
constexpr auto* kBf16 = &bf16;
constexpr int64_t kBf16Flops = int64_t{4} * kLanes * kSums * kRounds;
#else
constexpr float (*kBf16)(int64_t, float, float) = nullptr;
constexpr int64_t kBf16Flops = 0;
#endif

constexpr int kBlock = 16;  // vectors of a round; 1024 bytes at the widest

uint64_t read(const void* source, int64_t bytes) {
  const Words* words = static_cast<const Words*>(source);
  Words sums[kBlock] = {};
  for (int64_t i = 0; i < bytes / kVectorBytes; i += kBlock) {
#pragma GCC unroll 16
    for (int j = 0; j < kBlock; ++j) {
      sums[j] ^= words[i + j];
    }
  }
  Words sum = {};
  for (const Words& part : sums) {
    sum ^= part;
  }
  uint64_t result = 0;
  for (int lane = 0; lane < kVectorBytes / 8; ++lane) {
    result ^= sum[lane];
  }
  return result;
}

void copy(void* target, const void* source, int64_t bytes) {
  Words* to = static_cast<Words*>(target);
  const Words* from = static_cast<const Words*>(source);
  for (int64_t i = 0; i < bytes / kVectorBytes; i += kBlock) {
#pragma GCC unroll 16
    for (int j = 0; j < kBlock; ++j) {
      to[i + j] = from[i + j];
    }
    asm volatile("" ::: "memory");  // else this becomes memcpy, with stores that kernels do not use
  }
}

}  // namespace

extern const CalibrationLoops PATCHGEN_FAST_LOOPS;
const CalibrationLoops PATCHGEN_FAST_LOOPS = {
    .fp32 = fp32,
    .fp32_flops = int64_t{2} * kLanes * kSums * kRounds,
    .bf16 = kBf16,
    .bf16_flops = kBf16Flops,
    .read = read,
    .copy = copy,
};

}  // namespace patchgen_fast::native
