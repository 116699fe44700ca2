// What `patchgen-fast info --kernels` shows of each CUDA kernel on the GPU at hand.
#pragma once

#include <string>
#include <vector>

namespace patchgen_fast::cuda {

struct KernelFacts {
  std::string name;
  int registers;     // a thread
  int local_bytes;   // a thread: spills, if above 0
  int shared_bytes;  // a block, at the largest size that the instance serves
  int threads;       // a block
  int blocks;        // resident on a multiprocessor at once; 0: does not fit
};

// Each file of kernels adds its own.
void describe_attention_forward(int device, std::vector<KernelFacts>& list);
void describe_attention_forward_sm90(int device, std::vector<KernelFacts>& list);
void describe_attention_backward_and_decode(int device, std::vector<KernelFacts>& list);
void describe_patch_embed(int device, std::vector<KernelFacts>& list);

}  // namespace patchgen_fast::cuda
