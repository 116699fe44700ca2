// What every torch boundary (`<op>_op.cpp`) of the CUDA kernels needs: torch's stable ABI, and no
// CUDA header.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"

// Lives in libtorch_cuda; weak, so that the library loads beside a torch without CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream)
    __attribute__((weak));

namespace patchgen_fast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void* current_stream(int device) {
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream ||
      aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error(
        "patchgen_fast: this torch has no CUDA stream to launch on\n"
        "Remedy: install a torch built for CUDA, or pass backend=\"cpu\"");
  return stream;
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::BFLOAT16;
    case ScalarType::Half:
      return DType::FLOAT16;
    case ScalarType::Float:
      return DType::FLOAT32;
    case ScalarType::Byte:
      return DType::UINT8;
    case ScalarType::Bool:
      return DType::BOOL;
    default:
      throw std::invalid_argument(
          "patchgen_fast CUDA kernels: expected float32, bfloat16, float16, uint8 or bool");
  }
}

template <class T = void>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// Kernels read rows 16 bytes at a time: what does not lie so is copied. Packed projections and
// head dimensions that are multiples of 8 always do; so does the gradient of a sum (stride 0),
// except along a row.
inline Tensor in_chunks(const Tensor& tensor) {
  constexpr int64_t CHUNK = 8;
  const int64_t along = tensor.dim() - 1;
  bool fits = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 &&
              (tensor.stride(along) == 1 || tensor.size(along) == 1);
  for (int64_t d = 0; d < along; ++d)
    fits = fits && (tensor.stride(d) % CHUNK == 0 || tensor.size(d) <= 1);
  return fits ? tensor : torch::stable::clone(torch::stable::contiguous(tensor));
}

// Uninitialised, on the device of `like`.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, type);
}

}  // namespace patchgen_fast::cuda
