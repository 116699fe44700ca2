// Every kernel that is compiled once per instruction set: KERNEL(name, signature). A new kernel is
// one line here, the header of its arguments, and the header of its code in kernels_isa.h.
#pragma once

#define PATCHGEN_FAST_KERNELS(KERNEL)
