// The kernels for AVX-512: the flags of AVX2 and -mavx512f -mavx512bw -mavx512dq -mavx512vl
#define PATCHGEN_FAST_TABLE kernels_avx512
#include "kernels_isa.h"
