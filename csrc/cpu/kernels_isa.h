// Compiles every kernel for the instruction set that the compiler's flags name, and fills the table
// PATCHGEN_FAST_TABLE (kernels_<isa>.cpp sets that name and includes this file, once).
//
// All code below has internal linkage. A weak symbol compiled with these flags (an inline function
// of a standard header, say) could be the copy that the linker keeps for the whole library, and
// would stop an older CPU with SIGILL; the build checks with nm that there is none. Hence: no
// std:: containers, no exceptions, no allocation in kernels.
#include "attention_backward_kernel.h"
#include "attention_decode_kernel.h"
#include "attention_kernel.h"
#include "attention_mask_gradient_kernel.h"
#include "gemm_outer_kernel.h"
#include "gemm_sums_kernel.h"
#include "kernels.h"
#include "layer_norm_kernel.h"
#include "linear_few_rows_kernel.h"
#include "linear_kernel.h"
#include "patch_embed_kernel.h"
#include "patch_unembed_kernel.h"
#include "qk_norm_rope_kernel.h"
#include "simd.h"

namespace patchgen_fast {

extern const KernelTable PATCHGEN_FAST_TABLE;
const KernelTable PATCHGEN_FAST_TABLE = {
#define PATCHGEN_FAST_VALUE(name, ...) name,
    PATCHGEN_FAST_KERNELS(PATCHGEN_FAST_VALUE)
#undef PATCHGEN_FAST_VALUE
};

}  // namespace patchgen_fast
