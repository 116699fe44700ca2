#include "patch_embed_launch.cuh"

namespace patchgen_fast::cuda {

PATCHGEN_EXTERN(, bfloat16)

}  // namespace patchgen_fast::cuda
