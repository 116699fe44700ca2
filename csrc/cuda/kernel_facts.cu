// The facts of all kernels as JSON, for Python (ctypes).
#include <cuda_runtime.h>

#include "kernel_facts.h"

namespace {

std::string as_json(const std::vector<patchgen_fast::cuda::KernelFacts>& list) {
  std::string text = "[";
  for (const auto& facts : list) {
    if (text.size() > 1) text += ", ";
    text += "{\"kernel\": \"" + facts.name +
            "\", \"registers\": " + std::to_string(facts.registers) +
            ", \"local_bytes\": " + std::to_string(facts.local_bytes) +
            ", \"shared_bytes\": " + std::to_string(facts.shared_bytes) +
            ", \"threads\": " + std::to_string(facts.threads) +
            ", \"blocks_per_multiprocessor\": " + std::to_string(facts.blocks) + "}";
  }
  return text + "]";
}

}  // namespace

// Of the kernels that have code for GPU `device`; "[]" where there is no such GPU. The text stays
// valid until this thread's next call.
extern "C" __attribute__((visibility("default"))) const char* patchgen_fast_cuda_kernels(
    int device) {
  using namespace patchgen_fast::cuda;
  static thread_local std::string text;
  std::vector<KernelFacts> list;
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess && device >= 0 && device < count) {
    describe_attention_forward(device, list);
    describe_attention_forward_sm90(device, list);
    describe_attention_backward_and_decode(device, list);
    describe_patch_embed(device, list);
  } else {
    cudaGetLastError();
  }
  text = as_json(list);
  return text.c_str();
}
