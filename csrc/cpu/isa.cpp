#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace patchgen_fast {

#if defined(__x86_64__)
// __builtin_cpu_supports of clang 14 does not know the name "f16c".
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __builtin_cpu_supports("avx") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 &&
         (ecx & bit_F16C) != 0;
}
#endif

namespace {

bool always() {
  return true;
}

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

[[maybe_unused]] bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16");
}
#endif

std::string choices() {
  std::string text;
  for (const InstructionSet& set : instruction_sets()) {
    if (set.supported()) {
      text += (text.empty() ? "" : ", ") + std::string(set.name);
    }
  }
  return text;
}

[[noreturn]] void refuse(const std::string& name, const char* reason) {
  throw std::invalid_argument("PATCHGEN_FAST_CPU_ISA: expected one of " + choices() + "; got '" +
                              name + "', " + reason + ". Set one of these, or unset it.");
}

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = {
#if defined(PATCHGEN_FAST_HAVE_AVX512_BF16)
      {Isa::avx512_bf16, "avx512_bf16", has_avx512_bf16},
#endif
#if defined(PATCHGEN_FAST_HAVE_AVX512)
      {Isa::avx512, "avx512", has_avx512},
#endif
#if defined(PATCHGEN_FAST_HAVE_AVX2)
      {Isa::avx2, "avx2", has_avx2},
#endif
      {Isa::baseline, "baseline", always},
  };
  return sets;
}

const InstructionSet& choose_isa(const std::string& override_name) {
  for (const InstructionSet& set : instruction_sets()) {
    if (override_name.empty() ? set.supported() : override_name == set.name) {
      if (!set.supported()) {
        refuse(override_name, "which this CPU does not support");
      }
      return set;
    }
  }
  refuse(override_name, "which is not an instruction set of this build");
}

const InstructionSet& chosen_isa() {
  static const InstructionSet& chosen = [&]() -> const InstructionSet& {
    const char* name = std::getenv("PATCHGEN_FAST_CPU_ISA");
    return choose_isa(name == nullptr ? "" : name);
  }();
  return chosen;
}

}  // namespace patchgen_fast
