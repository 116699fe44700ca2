#define PATCHGEN_FAST_LOOPS loops_avx2
#include "calibrate_isa.h"
