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

// The C interface's number of a dtype.
inline int32_t dtype_number(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Bool:
      return aoti_torch_dtype_bool();
    default:
      throw std::invalid_argument(
          "patchgen_fast CPU kernels: expected float32, bfloat16, float16, uint8 or bool");
  }
}

// An uninitialised CPU tensor. Not by torch::stable::empty and transpose: these look their operator
// up by its name at every call, which takes longer than a small kernel.
inline Tensor new_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                          ScalarType type) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype_number(type),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  prefer_huge_pages(tensor);
  return tensor;
}

template <size_t Dims>
Tensor new_strided(const int64_t (&sizes)[Dims], const int64_t (&strides)[Dims], ScalarType type) {
  return new_strided(Dims, sizes, strides, type);
}

// The same, contiguous.
template <size_t Dims>
Tensor new_tensor(const int64_t (&sizes)[Dims], ScalarType type) {
  int64_t strides[Dims];
  int64_t stride = 1;
  for (size_t i = Dims; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return new_strided(sizes, strides, type);
}

// Shape [batch, heads, tokens, dim] as `like`, over memory [batch, tokens, heads, dim].
inline Tensor new_rows_like(const Tensor& like) {
  const int64_t batch = like.size(0), heads = like.size(1), tokens = like.size(2),
                dim = like.size(3);
  const auto one_at_least = [](int64_t size) { return size > 1 ? size : 1; };
  const int64_t token = one_at_least(heads) * one_at_least(dim);
  return new_strided({batch, heads, tokens, dim},
                     {one_at_least(tokens) * token, one_at_least(dim), token, 1},
                     like.scalar_type());
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
