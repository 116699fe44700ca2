// The kernels of csrc/cuda, compiled for the host and run by the emulator. Python calls these
// through ctypes; each returns 0, or 1 with a message in `error`.
#include "attention_plan.cuh"
#include "patch_embed_plan.cuh"

using namespace patchgen_fast::cuda;

namespace {

struct Options {  // as in conftest.py
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
      emulator::Report report = emulator::launch(
          static_cast<unsigned>(launch.blocks), launch.threads, launch.shared_bytes, how,
          [&] { call(kernel, arguments...); });
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
auto with_dtype(DType dtype, Use use) {
  return dtype == DType::BFLOAT16 ? use(bfloat16{}) : use(float16{});
}

}  // namespace

extern "C" int host_attention_forward(const AttentionForward* problem, const Options* options,
                                      Result* result) {
  return with_dtype(problem->dtype, [&](auto element) {
    return run_on_host(*options, result, [&](auto run) {
      plan_attention_forward<decltype(element)>(*problem, options->multiprocessors, run);
    });
  });
}

extern "C" int host_attention_decode(const AttentionForward* problem, const Options* options,
                                     Result* result) {
  const DecodeSize size = decode_size(*problem, options->multiprocessors);
  // Of the exact sizes, and NaN where a GPU would have whatever was there.
  std::vector<float> partial(size.partial_floats, NAN);
  std::vector<unsigned> tickets(size.tickets, 0);
  return with_dtype(problem->dtype, [&](auto element) {
    return run_on_host(*options, result, [&](auto run) {
      plan_attention_decode<decltype(element)>(
          *problem, {partial.data(), tickets.data(), size.splits}, run);
    });
  });
}

extern "C" int host_attention_backward(const AttentionBackward* problem, const Options* options,
                                       Result* result) {
  return with_dtype(problem->dtype, [&](auto element) {
    return run_on_host(*options, result, [&](auto run) {
      plan_attention_backward<decltype(element)>(*problem, run);
    });
  });
}

extern "C" int host_patch_embed(const PatchEmbedForward* problem, const Options* options,
                                Result* result) {
  return with_dtype(problem->dtype, [&](auto element) {
    return run_on_host(*options, result, [&](auto run) {
      plan_patch_embed<decltype(element)>(*problem, run);
    });
  });
}

extern "C" int host_patch_embed_splits(const PatchGeometry* geometry, int embed,
                                       int multiprocessors) {
  return plan_splits(*geometry, embed, multiprocessors);
}

extern "C" int host_patch_embed_backward(const PatchEmbedBackward* problem,
                                         const PatchGeometry* grad_geometry,
                                         const Options* options, Result* result) {
  return with_dtype(problem->dtype, [&](auto element) {
    return run_on_host(*options, result, [&](auto run) {
      plan_patch_embed_backward<decltype(element)>(*problem, *grad_geometry, run);
    });
  });
}
