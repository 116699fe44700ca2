// Facts of the CPU: its features and its caches.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace patchgen_fast::native {

struct Cache {
  int level;
  std::string type;  // "data", "instruction", "unified"
  int64_t bytes;
  int64_t line_bytes;  // 0: unknown
  int shared_by;       // logical CPUs that share one; 0: unknown
};

// Data and unified caches that CPU 0 sees, smallest level first; empty if the system does not tell.
std::vector<Cache> caches();

// Names of the vector and matrix features that CPU and operating system support, as compilers name
// them.
std::vector<std::string> cpu_features();

}  // namespace patchgen_fast::native
