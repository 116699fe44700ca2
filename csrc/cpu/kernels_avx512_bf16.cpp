// The kernels for AVX-512 with bf16 dot products: the flags of AVX-512 and -mavx512bf16
#define PATCHGEN_FAST_TABLE kernels_avx512_bf16
#include "kernels_isa.h"
