#define PATCHGEN_FAST_LOOPS loops_avx512_bf16
#include "calibrate_isa.h"
