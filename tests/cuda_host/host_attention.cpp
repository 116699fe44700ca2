// The attention kernels of csrc/cuda, compiled for the host.
#include "attention_plan.cuh"
#include "host.h"

extern "C" int host_attention_forward(const AttentionForward* problem, const Options* options,
                                      Result* result) {
  return with_dtype(problem->dtype, [&](auto element) {
    return run_on_host(*options, result, [&](auto run) {
      plan_attention_forward<decltype(element)>(*problem, options->multiprocessors, run);
    });
  });
}

extern "C" int host_attention_forward_sm90(const AttentionForward* problem, const Options* options,
                                           Result* result) {
  return with_dtype(problem->dtype, [&](auto element) {
    return run_on_host(*options, result, [&](auto run) {
      if (!served_by_sm90(*problem)) throw std::runtime_error("not served by the sm_90 kernel");
      plan_attention_forward_sm90<decltype(element)>(*problem, options->multiprocessors, run);
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
      plan_attention_decode<decltype(element)>(*problem,
                                               {partial.data(), tickets.data(), size.splits}, run);
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

extern "C" int host_attention_backward_sm90(const AttentionBackward* problem,
                                            const Options* options, Result* result) {
  return with_dtype(problem->dtype, [&](auto element) {
    return run_on_host(*options, result, [&](auto run) {
      if (!backward_served_by_sm90(*problem))
        throw std::runtime_error("not served by the sm_90 kernel");
      plan_attention_backward_sm90<decltype(element)>(*problem, run);
    });
  });
}

extern "C" void host_describe_attention(char* text, int size) {
  describe_on_host(text, size, [](auto run) {
    plan_every_forward<bfloat16>(DType::BFLOAT16, run);
    plan_every_forward_sm90<bfloat16>(DType::BFLOAT16, run);
    plan_every_backward_sm90<bfloat16>(DType::BFLOAT16, run);
    plan_every_backward_and_decode<bfloat16>(DType::BFLOAT16, run);
  });
}

// What patchgen_fast/ops/_cuda_limits.py computes for itself.
extern "C" int host_attention_forward_bytes(int head_dim, int keys) {
  int bytes = 0;
  with_width(head_dim, [&](auto width) { bytes = forward_shared_bytes<width>(keys); });
  return bytes;
}

extern "C" int host_attention_backward_bytes(int head_dim, int queries, int keys, int group) {
  int bytes = 0;
  with_width(head_dim,
             [&](auto width) { bytes = backward_shared_bytes<width>(queries, keys, group); });
  return bytes;
}
