#include "attention_launch.cuh"

namespace patchgen_fast::cuda {

void launch_attention_forward(const AttentionForward& p, int device, void* stream) {
  if (p.dtype == DType::BFLOAT16) return launch_forward_as<bfloat16>(p, device, stream);
  launch_forward_as<float16>(p, device, stream);
}

void launch_attention_backward(const AttentionBackward& p, int device, void* stream) {
  check_served(p, true);
  Launcher run(device, stream, [&] { return shape_of(p); });
  if (p.dtype == DType::BFLOAT16) return plan_attention_backward<bfloat16>(p, run);
  plan_attention_backward<float16>(p, run);
}

DecodeSize attention_decode_size(const AttentionInputs& p, int device) {
  return decode_size(p, device_facts(device).multiprocessors);
}

void launch_attention_decode(const AttentionForward& p, const DecodeWork& work, int device,
                             void* stream) {
  check_head_dim(p);
  Launcher run(device, stream, [&] { return shape_of(p); });
  if (p.dtype == DType::BFLOAT16) return plan_attention_decode<bfloat16>(p, work, run);
  plan_attention_decode<float16>(p, work, run);
}

int64_t attention_forward_shared_memory(int head_dim, int keys) {
  int64_t bytes = 0;
  with_width(head_dim, [&](auto width) { bytes = forward_shared_bytes<width>(keys); });
  return bytes;
}

int64_t attention_backward_shared_memory(int head_dim, int queries, int keys, int group) {
  int64_t bytes = 0;
  with_width(head_dim,
             [&](auto width) { bytes = backward_shared_bytes<width>(queries, keys, group); });
  return bytes;
}

void describe_attention_forward(int device, std::vector<KernelFacts>& list) {
  describe_forward_as<bfloat16>(DType::BFLOAT16, device, list);
  describe_forward_as<float16>(DType::FLOAT16, device, list);
}

void describe_attention_backward_and_decode(int device, std::vector<KernelFacts>& list) {
  plan_every_backward_and_decode<bfloat16>(DType::BFLOAT16, Describer(device, list));
  plan_every_backward_and_decode<float16>(DType::FLOAT16, Describer(device, list));
}

}  // namespace patchgen_fast::cuda
