// A file of its own: setup.py passes the facts as macros, and only this is compiled again when one
// of them changes.
#include "build_facts.h"

#if !defined(PATCHGEN_FAST_BUILD_COMPILER)
#error "compile this through setup.py, which defines the PATCHGEN_FAST_BUILD_ macros"
#endif

namespace patchgen_fast::native {

std::map<std::string, std::string> build_facts() {
  return {
      {"compiler", PATCHGEN_FAST_BUILD_COMPILER},
      {"flags", PATCHGEN_FAST_BUILD_FLAGS},
      {"cuda_archs", PATCHGEN_FAST_BUILD_CUDA_ARCHS},
  };
}

}  // namespace patchgen_fast::native
