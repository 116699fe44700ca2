// A CUDA driver that does nothing, for benchmarks/host_cost.py: every call succeeds at once, so
// that what is timed is the host's way to the driver and nothing beyond it.

#include <stddef.h>
#include <stdint.h>

static int something;

int cuDriverGetVersion(int* version) {
  return *version = 13000, 0;
}
int cuGetErrorString(int error, const char** text) {
  return (void)error, *text = "none", 0;
}
int cuDeviceGet(int* device, int ordinal) {
  return *device = ordinal, 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 10:
      return *value = 32, 0;  // threads a warp
    case 16:
      return *value = 132, 0;  // multiprocessors
    case 75:
      return *value = 9, 0;  // compute capability
    case 76:
      return *value = 0, 0;
    default:
      return *value = 232448, 0;  // bytes of shared memory a block, the only other one asked
  }
}

int cuCtxGetCurrent(void** context) {
  return *context = &something, 0;
}
int cuCtxSetCurrent(void* context) {
  return (void)context, 0;
}
int cuCtxGetLimit(size_t* value, int limit) {
  return (void)limit, *value = 0, 0;
}
int cuCtxSetLimit(int limit, size_t value) {
  return (void)limit, (void)value, 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  return (void)device, *context = &something, 0;
}

int cuModuleLoadData(void** module, const void* image) {
  return (void)image, *module = &something, 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  return (void)module, (void)name, *function = &something, 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  (void)function;
  return *value = attribute == 0 ? 1024 : 0, 0;  // 0: threads a block
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  return (void)function, (void)attribute, (void)value, 0;
}
int cuFuncSetCacheConfig(void* function, int config) {
  return (void)function, (void)config, 0;
}
int cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) {
  return (void)function, (void)config, *clusters = 1, 0;
}
int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  return (void)attribute, *(uint64_t*)data = pointer, 0;
}
int cuTensorMapEncodeTiled(void) {
  return 0;
}

static long launches;
long launches_so_far(void) {
  return launches;
}
int cuLaunchKernelEx(const void* config, void* function, void** arguments, void** extra) {
  (void)config, (void)function, (void)arguments, (void)extra;
  return ++launches, 0;
}
