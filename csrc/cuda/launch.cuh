// From a plan to a running kernel: device guard, cached attributes, errors that say what to do.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_facts.h"
#include "plan.h"

namespace patchgen_fast::cuda {

[[noreturn]] inline void fail(const std::string& what, const std::string& remedy) {
  throw std::runtime_error("patchgen_fast: " + what + "\nRemedy: " + remedy);
}

// Makes `device` current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaGetDevice(&previous_);
    changed_ = previous_ != device;
    if (changed_) cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

struct DeviceFacts {
  int multiprocessors = 0;
  int shared_bytes = 0;  // the most a block can have
  int major = 0, minor = 0;
};

// Asked of the driver once a device.
inline const DeviceFacts& device_facts(int device) {
  static std::mutex mutex;
  static std::vector<DeviceFacts*> known;  // never freed: callers keep references
  std::lock_guard<std::mutex> lock(mutex);
  if (device >= static_cast<int>(known.size())) known.resize(device + 1);
  if (!known[device]) {
    auto* facts = new DeviceFacts;
    cudaDeviceGetAttribute(&facts->multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&facts->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&facts->major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&facts->minor, cudaDevAttrComputeCapabilityMinor, device);
    known[device] = facts;
  }
  return *known[device];
}

inline std::string chip(const DeviceFacts& facts) {
  return "sm_" + std::to_string(facts.major) + std::to_string(facts.minor);
}

// What went wrong, by the code that the runtime gave.
[[noreturn]] inline void fail_with_code(cudaError_t code, const Instance& instance,
                                        const std::string& shape, const DeviceFacts& facts) {
  const std::string what = instance.name() + " for " + shape + " on " + chip(facts) + ": " +
                           cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ")";
  if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorInvalidDeviceFunction)
    fail(what,
         "the package was built without code for this GPU: reinstall it with "
         "PATCHGEN_FAST_CUDA_ARCHS naming its architecture, or pass backend=\"triton\"");
  if (code == cudaErrorMemoryAllocation) fail(what, "free GPU memory, or take a smaller batch");
  fail(what,
       "if an earlier kernel failed, CUDA_LAUNCH_BLOCKING=1 shows which; else please report "
       "it, and pass backend=\"triton\" or backend=\"torch\" meanwhile");
}

// What a plan calls to launch. `shape` is asked for only if something is wrong.
template <class Shape>
class Launcher {
 public:
  Launcher(int device, void* stream, Shape shape)
      : guard_(device),
        facts_(device_facts(device)),
        device_(device),
        stream_(static_cast<cudaStream_t>(stream)),
        shape_(shape) {}

  int multiprocessors() const { return facts_.multiprocessors; }

  template <auto* FUNCTION, class... Arguments>
  void operator()(const Instance& instance, const Launch& launch, Kernel<FUNCTION>,
                  const Arguments&... arguments) const {
    if (launch.blocks > 2147483647)
      fail(instance.name() + " for " + shape_() + " would need " + std::to_string(launch.blocks) +
               " blocks, and a grid has at most 2147483647",
           "split the batch");
    if (launch.shared_bytes > facts_.shared_bytes)
      fail(instance.name() + " for " + shape_() + " needs " + kibibytes(launch.shared_bytes) +
               " of shared memory a block, and this GPU (" + chip(facts_) + ") has " +
               kibibytes(facts_.shared_bytes),
           "pass backend=None or backend=\"triton\", which streams what does not fit");
    prepare<FUNCTION>(instance);
    FUNCTION<<<static_cast<unsigned>(launch.blocks), launch.threads, launch.shared_bytes,
               stream_>>>(arguments...);
    check(cudaGetLastError(), instance);
  }

 private:
  static std::string kibibytes(int bytes) { return std::to_string((bytes + 1023) / 1024) + " KiB"; }

  void check(cudaError_t code, const Instance& instance) const {
    if (code != cudaSuccess) fail_with_code(code, instance, shape_(), facts_);
  }

  // Lets the kernel have all the shared memory there is: once for a kernel and a device, since
  // setting an attribute costs as much as a launch.
  template <auto* FUNCTION>
  void prepare(const Instance& instance) const {
    static std::atomic<uint64_t> prepared{0};
    const uint64_t bit = device_ < 64 ? uint64_t{1} << device_ : 0;  // beyond: every time
    if (prepared.load(std::memory_order_relaxed) & bit) return;
    check(cudaFuncSetAttribute(FUNCTION, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               facts_.shared_bytes),
          instance);
    check(cudaFuncSetAttribute(FUNCTION, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          instance);
    prepared.fetch_or(bit, std::memory_order_relaxed);
  }

  DeviceGuard guard_;
  const DeviceFacts& facts_;
  int device_;
  cudaStream_t stream_;
  Shape shape_;
};

// What a plan calls to describe its kernels instead of launching them.
class Describer {
 public:
  Describer(int device, std::vector<KernelFacts>& list)
      : guard_(device), facts_(device_facts(device)), list_(list) {}

  int multiprocessors() const { return facts_.multiprocessors; }

  template <auto* FUNCTION, class... Arguments>
  void operator()(const Instance& instance, const Launch& launch, Kernel<FUNCTION>,
                  const Arguments&...) const {
    cudaFuncAttributes found{};
    if (cudaFuncGetAttributes(&found, FUNCTION) != cudaSuccess) {
      cudaGetLastError();  // no code for this GPU: nothing to describe
      return;
    }
    KernelFacts facts{instance.name(),     found.numRegs,  static_cast<int>(found.localSizeBytes),
                      launch.shared_bytes, launch.threads, 0};
    if (launch.shared_bytes <= facts_.shared_bytes) {
      cudaFuncSetAttribute(FUNCTION, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           facts_.shared_bytes);
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&facts.blocks, FUNCTION, launch.threads,
                                                    launch.shared_bytes);
    }
    list_.push_back(facts);
  }

 private:
  DeviceGuard guard_;
  const DeviceFacts& facts_;
  std::vector<KernelFacts>& list_;
};

}  // namespace patchgen_fast::cuda
