#define PATCHGEN_FAST_LOOPS loops_avx512
#include "calibrate_isa.h"
