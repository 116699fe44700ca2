#pragma once

namespace patchgen_fast::cuda {

enum class DType : int { BFLOAT16, FLOAT16, FLOAT32, UINT8, BOOL };

}  // namespace patchgen_fast::cuda
