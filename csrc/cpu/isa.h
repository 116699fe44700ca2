// Instruction sets that the CPU kernels are compiled for, best first, and the one in use.
//
// The choice is made once, at the first question: the best set that this CPU and operating system
// support, or the one named by PATCHGEN_FAST_CPU_ISA. Free of torch and of the kernels, so that the
// native face of the package can answer the same questions. The build defines
// PATCHGEN_FAST_HAVE_<ISA> for each set that its compiler knows.
#pragma once

#include <string>
#include <vector>

namespace patchgen_fast {

enum class Isa { avx512_bf16, avx512, avx2, baseline };

struct InstructionSet {
  Isa isa;
  const char* name;
  bool (*supported)();  // by this CPU and operating system
};

#if defined(__x86_64__)
// Conversions of float16 by the CPU, and an operating system that lets them be used.
bool has_f16c();
#endif

// Every instruction set of this build, best first; the last one runs everywhere.
const std::vector<InstructionSet>& instruction_sets();

// The instruction set in use. Throws std::invalid_argument if PATCHGEN_FAST_CPU_ISA names an
// unknown set or one that this CPU lacks; the text lists the choices.
const InstructionSet& chosen_isa();

// What `chosen_isa` does with the given override (empty: none), without the memory.
const InstructionSet& choose_isa(const std::string& override_name);

}  // namespace patchgen_fast
