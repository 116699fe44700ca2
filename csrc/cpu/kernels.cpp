#include "kernels.h"

#include "isa.h"

namespace patchgen_fast {

extern const KernelTable kernels_baseline;
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_avx512_bf16;

namespace {

const KernelTable& table_of(Isa isa) {
  switch (isa) {
#if defined(PATCHGEN_FAST_HAVE_AVX512_BF16)
    case Isa::avx512_bf16:
      return kernels_avx512_bf16;
#endif
#if defined(PATCHGEN_FAST_HAVE_AVX512)
    case Isa::avx512:
      return kernels_avx512;
#endif
#if defined(PATCHGEN_FAST_HAVE_AVX2)
    case Isa::avx2:
      return kernels_avx2;
#endif
    default:
      return kernels_baseline;
  }
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = table_of(chosen_isa().isa);
  return table;
}

}  // namespace patchgen_fast
