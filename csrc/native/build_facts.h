// What setup.py compiled this package with.
#pragma once

#include <map>
#include <string>

namespace patchgen_fast::native {

// compiler, flags, cuda_archs (";"-separated, empty without CUDA kernels).
std::map<std::string, std::string> build_facts();

}  // namespace patchgen_fast::native
