#include <cstdlib>
#include <cstring>

#include "attention_launch.cuh"

namespace patchgen_fast::cuda {

// The wgmma kernels have run on the host only. Until they have been measured on a Hopper GPU, those
// that are portable are taken there too, unless this asks for them.
static bool wants_wgmma() {
  static const char* value = std::getenv("PATCHGEN_FAST_CUDA_WGMMA");
  return value && std::strcmp(value, "1") == 0;
}

void launch_attention_forward(const AttentionForward& p, int device, void* stream) {
  if (wants_wgmma() && device_facts(device).major == 9 && served_by_sm90(p))
    return launch_attention_forward_sm90(p, device, stream);
  if (p.dtype == DType::BFLOAT16) return launch_forward_as<bfloat16>(p, device, stream);
  launch_forward_as<float16>(p, device, stream);
}

void launch_attention_backward(const AttentionBackward& p, int device, void* stream) {
  check_served(p, true);
  if (wants_wgmma() && device_facts(device).major == 9 && backward_served_by_sm90(p))
    return launch_attention_backward_sm90(p, device, stream);
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

void describe_attention_forward(int device, std::vector<KernelFacts>& list) {
  describe_forward_as<bfloat16>(DType::BFLOAT16, device, list);
  describe_forward_as<float16>(DType::FLOAT16, device, list);
}

void describe_attention_backward_and_decode(int device, std::vector<KernelFacts>& list) {
  plan_every_backward_and_decode<bfloat16>(DType::BFLOAT16, Describer(device, list));
  plan_every_backward_and_decode<float16>(DType::FLOAT16, Describer(device, list));
  describe_attention_backward_sm90(device, list);
}

}  // namespace patchgen_fast::cuda
