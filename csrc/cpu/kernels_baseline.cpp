// The kernels for any CPU: vector extensions of the compiler only, no header of a vendor.
#define PATCHGEN_FAST_TABLE kernels_baseline
#include "kernels_isa.h"
