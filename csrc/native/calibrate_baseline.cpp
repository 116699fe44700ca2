#define PATCHGEN_FAST_LOOPS loops_baseline
#include "calibrate_isa.h"
