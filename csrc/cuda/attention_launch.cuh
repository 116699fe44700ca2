// Launching and describing the attention kernels; instantiated by attention_*.cu, one file for each
// part so that they compile side by side.
#pragma once

#include "attention_plan.cuh"
#include "launch.cuh"

namespace patchgen_fast::cuda {

inline std::string shape_of(const AttentionInputs& p) {
  return "batch=" + std::to_string(p.batch) + ", heads=" + std::to_string(p.heads) +
         ", kv_heads=" + std::to_string(p.kv_heads) + ", queries=" + std::to_string(p.queries) +
         ", keys=" + std::to_string(p.keys) + ", head_dim=" + std::to_string(p.head_dim);
}

// What the kernels cannot do whatever the GPU. Dispatch refuses it before; this is the last line.
inline void check_head_dim(const AttentionInputs& p) {
  if (p.head_dim < CHUNK || p.head_dim > 128 || p.head_dim % CHUNK != 0)
    fail("CUDA attention expects a head dimension that is a multiple of 8 up to 128, got " +
             shape_of(p),
         "pass backend=None or backend=\"triton\"");
}

inline void check_served(const AttentionInputs& p, bool short_queries) {
  check_head_dim(p);
  if (p.keys > SHORT_SEQUENCE || (short_queries && p.queries > SHORT_SEQUENCE))
    fail("CUDA attention expects at most " + std::to_string(SHORT_SEQUENCE) + " keys" +
             (short_queries ? " and queries" : "") + ", got " + shape_of(p),
         "pass backend=None or backend=\"triton\", which streams longer sequences");
}

void launch_attention_forward_sm90(const AttentionForward& p, int device, void* stream);
void launch_attention_backward_sm90(const AttentionBackward& p, int device, void* stream);
void describe_attention_backward_sm90(int device, std::vector<KernelFacts>& list);

template <class T>
void launch_forward_as(const AttentionForward& p, int device, void* stream) {
  check_served(p, false);
  Launcher run(device, stream, [&] { return shape_of(p); });
  plan_attention_forward<T>(p, run.multiprocessors(), run);
}

template <class T>
void describe_forward_as(DType dtype, int device, std::vector<KernelFacts>& list) {
  plan_every_forward<T>(dtype, Describer(device, list));
}

extern template void launch_forward_as<bfloat16>(const AttentionForward&, int, void*);
extern template void launch_forward_as<float16>(const AttentionForward&, int, void*);
extern template void describe_forward_as<bfloat16>(DType, int, std::vector<KernelFacts>&);
extern template void describe_forward_as<float16>(DType, int, std::vector<KernelFacts>&);

}  // namespace patchgen_fast::cuda
