// Loops that show this machine's peak: arithmetic, clock, and bandwidth of each level of memory.
//
// The loops are compiled once per instruction set (calibrate_<isa>.cpp); what is timed here is the
// loop of the instruction set in use.
#pragma once

#include <cstdint>
#include <string>

namespace patchgen_fast::native {

// Loops of one instruction set. Each returns something that depends on all its work, so that none
// of it can be optimised away.
struct CalibrationLoops {
  // `steps` rounds of independent multiply-adds; flops of one round.
  float (*fp32)(int64_t steps, float factor, float addend);
  int64_t fp32_flops;
  // The same with bf16 factors and float32 sums; null where the set has no such instruction.
  float (*bf16)(int64_t steps, float factor, float addend);
  int64_t bf16_flops;
  // `bytes` a multiple of 1024, pointers aligned to 64.
  uint64_t (*read)(const void* source, int64_t bytes);
  void (*copy)(void* target, const void* source, int64_t bytes);
};

struct Measurement {
  double best = 0;    // per second: flops, bytes, or cycles
  double median = 0;  // of the samples kept
  int kept = 0;
  int discarded = 0;       // another process or the hypervisor took the core in between
  bool disturbed = false;  // every sample was: `best` is a lower bound
};

enum class Arithmetic { fp32, bf16 };
enum class Traffic { read, copy };

// Summed over `threads` threads that run at the same time. bf16 without an instruction of its own
// is measured as fp32, which is how the kernels then compute it. Throws as `chosen_isa` does.
Measurement measure_arithmetic(Arithmetic kind, int threads, int samples);

// Bytes that every thread reads (copy: reads and writes) again and again in a buffer of its own of
// about `bytes_per_thread`; a copy's buffer holds source and target.
Measurement measure_bandwidth(Traffic kind, int64_t bytes_per_thread, int threads, int samples);

// Cycles per second of one core, by a chain of dependent additions.
Measurement measure_clock(int samples);

}  // namespace patchgen_fast::native
