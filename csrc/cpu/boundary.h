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
#include <vector>

#include "dtype.h"
#include "kept_memory.h"
#include "parallel.h"

// A tensor over memory that is ours to free. Of torch 2.11: weak, so that the library loads
// in 2.10.
extern "C" AOTITorchError torch_from_blob(void* data, int64_t dims, const int64_t* sizes,
                                          const int64_t* strides, int64_t offset, int32_t dtype,
                                          int32_t device_type, int32_t device_index,
                                          AtenTensorHandle* made, int32_t layout,
                                          const uint8_t* opaque, int64_t opaque_bytes,
                                          void (*free)(void* data, void* context), void* context)
#if defined(__APPLE__)
    __attribute__((weak_import));
#else
    __attribute__((weak));
#endif

namespace patchgen_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
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

inline Dtype dtype_of(const Tensor& tensor) {
  return dtype_of(tensor.scalar_type());
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

// Bytes from the first to the last element.
inline size_t span_bytes(int64_t dims, const int64_t* sizes, const int64_t* strides, size_t item) {
  int64_t last = 0;
  for (int64_t dim = 0; dim < dims; ++dim) {
    if (sizes[dim] == 0) {
      return 0;
    }
    last += (sizes[dim] - 1) * strides[dim];
  }
  return static_cast<size_t>(last + 1) * item;
}

// An uninitialised CPU tensor; a large one in kept memory, where torch can be told how to free it.
// Not by torch::stable::empty and transpose: these look their operator up by its name at every
// call, which takes longer than a small kernel.
inline Tensor new_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                          ScalarType type) {
  AtenTensorHandle handle = nullptr;
  const int32_t dtype = dtype_number(type);
  const int32_t cpu = aoti_torch_device_type_cpu();
  const size_t bytes = span_bytes(dims, sizes, strides, size_of(dtype_of(type)));
  Block block;
  if (bytes >= kLeastKept && torch_from_blob != nullptr && kept_limit() > 0) {
    block = take_block(bytes);
  }
  if (block.data == nullptr) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, cpu, 0, &handle));
    Tensor tensor(handle);
    prefer_huge_pages({tensor.mutable_data_ptr(), bytes});
    return tensor;
  }
  const auto give_back = [](void* data, void* size) {
    return_block({data, reinterpret_cast<size_t>(size)});
  };
  // Where this fails, torch may have freed the block already: rather lost than given back twice.
  TORCH_ERROR_CODE_CHECK(torch_from_blob(block.data, dims, sizes, strides, 0, dtype, cpu, -1,
                                         &handle, aoti_torch_layout_strided(), nullptr, 0,
                                         give_back, reinterpret_cast<void*>(block.bytes)));
  return Tensor(handle);
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

// An uninitialised contiguous tensor of `like`'s shape, but for its last dimension.
inline Tensor new_rows(const Tensor& like, int64_t last) {
  const int64_t dims = like.dim();
  std::vector<int64_t> layout(2 * dims);
  int64_t* sizes = layout.data();
  int64_t* strides = sizes + dims;
  int64_t stride = 1;
  for (int64_t dim = dims - 1; dim >= 0; --dim) {
    sizes[dim] = dim + 1 < dims ? like.size(dim) : last;
    strides[dim] = stride;
    stride *= sizes[dim] > 1 ? sizes[dim] : 1;
  }
  return new_strided(dims, sizes, strides, like.scalar_type());
}

// The same, of `like`'s shape and dtype.
inline Tensor new_like(const Tensor& like) {
  return new_rows(like, like.size(like.dim() - 1));
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
