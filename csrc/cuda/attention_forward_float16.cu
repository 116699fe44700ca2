#include "attention_launch.cuh"

namespace patchgen_fast::cuda {

template void launch_forward_as<float16>(const AttentionForward&, int, void*);
template void describe_forward_as<float16>(DType, int, std::vector<KernelFacts>&);

}  // namespace patchgen_fast::cuda
