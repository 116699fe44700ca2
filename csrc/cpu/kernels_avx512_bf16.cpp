// The kernels for AVX-512 with dot products of bytes and of bf16: the flags of AVX-512,
// -mavx512vnni and -mavx512bf16
#define PATCHGEN_FAST_TABLE kernels_avx512_bf16
#include "kernels_isa.h"
