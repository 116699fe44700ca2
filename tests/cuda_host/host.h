// Runs a plan of csrc/cuda on the host. Python calls the functions of host_*.cpp through ctypes;
// each returns 0, or 1 with a message in `error`.
#pragma once

#include <algorithm>
#include <cstdio>
#include <exception>

#include "element.cuh"
#include "plan.h"

using namespace patchgen_fast::cuda;

struct Options {  // as in harness.py
  int late_copies;
  uint32_t seed;
  int multiprocessors;
  int left_out, left_out_index;
};

struct Result {
  long matrices_loaded, wavefronts, products;
  int syncs[emulator::SYNC_KINDS];
  char error[512];
};

template <auto* FUNCTION, class... Arguments>
void call(Kernel<FUNCTION>, const Arguments&... arguments) {
  FUNCTION(arguments...);
}

template <class Plan>
int run_on_host(const Options& options, Result* result, Plan plan) {
  emulator::Options how{options.late_copies ? emulator::Timing::LATE : emulator::Timing::EARLY,
                        options.seed, static_cast<emulator::Sync>(options.left_out),
                        options.left_out_index};
  try {
    plan([&](const Instance&, const Launch& launch, auto kernel, const auto&... arguments) {
      emulator::Report report =
          emulator::launch(static_cast<unsigned>(launch.blocks), launch.threads,
                           launch.shared_bytes, how, [&] { call(kernel, arguments...); });
      result->matrices_loaded += report.matrices_loaded;
      result->wavefronts += report.wavefronts;
      result->products += report.products;
      std::copy_n(report.syncs, emulator::SYNC_KINDS, result->syncs);
    });
    return 0;
  } catch (const std::exception& error) {
    snprintf(result->error, sizeof result->error, "%s", error.what());
    return 1;
  }
}

// Calls use(T{}) with the element type.
template <class Use>
int with_dtype([[maybe_unused]] DType dtype, Use use) {
#if !defined(PATCHGEN_FEWER_INSTANCES)
  if (dtype == DType::FLOAT16) return use(float16{});
#endif
  return use(bfloat16{});
}

// A line for each instance that a plan would launch: its name, threads, bytes of shared memory.
template <class Plan>
void describe_on_host(char* text, int size, Plan plan) {
  std::string lines;
  plan([&](const Instance& instance, const Launch& launch, auto, const auto&...) {
    lines += instance.name() + "\t" + std::to_string(launch.threads) + "\t" +
             std::to_string(launch.shared_bytes) + "\n";
  });
  snprintf(text, size, "%s", lines.c_str());
}
