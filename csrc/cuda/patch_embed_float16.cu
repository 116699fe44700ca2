#include "patch_embed_launch.cuh"

namespace patchgen_fast::cuda {

PATCHGEN_EXTERN(, float16)

}  // namespace patchgen_fast::cuda
