// The kernels for x86-64 with AVX2, FMA and F16C: -mavx2 -mfma -mf16c
#define PATCHGEN_FAST_TABLE kernels_avx2
#include "kernels_isa.h"
