// The native face of the package that touches no tensor (pybind11).
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_native_info, m) {
  m.def("chosen_isa", [] { return patchgen_fast::chosen_isa().name; });
}
