// The kernels of one instruction set as a table of plain functions, and the table in use.
#pragma once

#include <type_traits>

#include "kernel_list.h"

namespace patchgen_fast {

struct KernelTable {
#define PATCHGEN_FAST_FIELD(name, ...) std::add_pointer_t<__VA_ARGS__> name;
  PATCHGEN_FAST_KERNELS(PATCHGEN_FAST_FIELD)
#undef PATCHGEN_FAST_FIELD
};

// The kernels of the instruction set in use (isa.h). Throws as `chosen_isa` does.
const KernelTable& kernels();

}  // namespace patchgen_fast
