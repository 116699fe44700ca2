// How long a cache line takes from one core to another.
#pragma once

namespace patchgen_fast::native {

// Seconds one way between the first two CPUs that this process may use, the least of `samples`
// runs of a few hundred exchanges; 0 where there is only one, or a thread can't be kept on a CPU.
// Cores of one cache need some tens of nanoseconds, of two some hundreds: in a virtual machine it
// tells whether its processors lie together now.
double measure_handover(int samples);

}  // namespace patchgen_fast::native
