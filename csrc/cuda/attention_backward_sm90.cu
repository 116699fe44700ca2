#include "attention_launch.cuh"

namespace patchgen_fast::cuda {

void launch_attention_backward_sm90(const AttentionBackward& p, int device, void* stream) {
  Launcher run(device, stream, [&] { return shape_of(p); });
  if (p.dtype == DType::BFLOAT16) return plan_attention_backward_sm90<bfloat16>(p, run);
  plan_attention_backward_sm90<float16>(p, run);
}

void describe_attention_backward_sm90(int device, std::vector<KernelFacts>& list) {
  if (device_facts(device).major != 9) return;  // elsewhere the kernels are empty
  plan_every_backward_sm90<bfloat16>(DType::BFLOAT16, Describer(device, list));
  plan_every_backward_sm90<float16>(DType::FLOAT16, Describer(device, list));
}

}  // namespace patchgen_fast::cuda
