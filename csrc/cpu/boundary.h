// What every torch boundary (`<op>_op.cpp`) of the CPU kernels needs. Torch's stable ABI; kernels
// never include this.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dtype.h"
#include "parallel.h"

namespace patchgen_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::Byte:
      return Dtype::uint8;
    case ScalarType::Bool:
      return Dtype::boolean;
    default:
      throw std::invalid_argument(
          "patchgen_fast CPU kernels: expected float32, bfloat16, float16, uint8 or bool");
  }
}

template <class T = void>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// Threads as torch has them: obeys torch.set_num_threads, and is serial inside its own workers.
inline Parallel torch_parallel() {
  const auto run = [](int64_t begin, int64_t end, int64_t grain, RangeFunction body,
                      void* context) {
    torch::stable::parallel_for(begin, end, grain,
                                [&](int64_t from, int64_t to) { body(from, to, context); });
  };
  return {run, static_cast<int64_t>(torch::stable::get_num_threads())};
}

// The C library maps blocks above 32 MiB afresh at every allocation, and the kernel then faults
// them in 4 KiB at a time: four times as long as it takes to write them. Ask for 2 MiB pages
// instead. The pages are still touched first by the thread that writes them.
inline void prefer_huge_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kWorthwhile = size_t{8} << 20;
  constexpr uintptr_t kPage = 4096;
  const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  if (bytes >= kWorthwhile) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
    const uintptr_t last = (begin + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may be refused
  }
#else
  (void)tensor;
#endif
}

// An uninitialised contiguous CPU tensor.
template <size_t Dims>
Tensor new_tensor(const int64_t (&sizes)[Dims], ScalarType type) {
  Tensor tensor = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes, Dims), type);
  prefer_huge_pages(tensor);
  return tensor;
}

inline Tensor nothing(const Tensor& like) {
  return new_tensor({0}, like.scalar_type());
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// For kernels that take any strides but the last, which is 1. Gradients may be expanded, with 0.
inline Tensor last_stride_one(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) == 1 ? tensor
                                                            : torch::stable::contiguous(tensor);
}

// Small parameters that kernels take as contiguous floats, whatever they are stored as.
inline OptionalTensor as_floats(const OptionalTensor& tensor) {
  if (!tensor.has_value()) {
    return tensor;
  }
  return as_contiguous(tensor->scalar_type() == ScalarType::Float
                           ? *tensor
                           : torch::stable::to(*tensor, ScalarType::Float));
}

}  // namespace patchgen_fast
