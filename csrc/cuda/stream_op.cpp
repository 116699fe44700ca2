// Whether torch gives the stream to launch on, for Python (ctypes).
#include "boundary.h"

extern "C" __attribute__((visibility("default"))) bool patchgen_fast_cuda_finds_stream() {
  return aoti_torch_get_current_cuda_stream != nullptr;
}
