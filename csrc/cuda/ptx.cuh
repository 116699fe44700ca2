// Every machine instruction that the kernels use and plain C++ cannot express, one thin wrapper
// each.
//
// Kernels use these and nothing else of the machine, so the same sources run on the host: without
// nvcc this header takes the functions of the same names from tests/cuda_host/emulator_ptx.h.
// Register layouts of the matrix instructions are those of the PTX manual, "Matrix fragments for
// mma.m16n8k16": lane l holds rows l/4 and l/4 + 8 and columns 2(l%4), 2(l%4) + 1 of an
// accumulator.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#define PATCHGEN_DEVICE __device__ __forceinline__
#define PATCHGEN_HOST_DEVICE __host__ __device__
#define PATCHGEN_UNROLL _Pragma("unroll")
#define PATCHGEN_NO_UNROLL _Pragma("unroll 1")
#define PATCHGEN_PRAGMA(text) _Pragma(#text)
#define PATCHGEN_UNROLL_BY(count) PATCHGEN_PRAGMA(unroll count)
#define PATCHGEN_KERNEL(threads, min_blocks) __global__ void __launch_bounds__(threads, min_blocks)
// 1024 bytes: what a 128-byte swizzle pattern of TMA and wgmma must be aligned to.
#define PATCHGEN_SHARED_MEMORY(name) extern __shared__ __align__(1024) char name[]

namespace patchgen_fast::cuda {

// Shared memory is addressed by 32 bits: half the registers of a pointer.
PATCHGEN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
template <class T>
PATCHGEN_DEVICE T& shared_at(uint32_t address) {
  return *static_cast<T*>(__cvta_shared_to_generic(address));
}

// ---- what the compiler knows

// x, of which the compiler knows nothing: what a loop makes of it is made in each round. Compilers
// would make it once, before the loop, and keep it in registers that the loop needs for itself.
PATCHGEN_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- arithmetic

// 2^x, to about 2 ulp; denormal results become 0.
PATCHGEN_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

PATCHGEN_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

PATCHGEN_DEVICE uint32_t pack_float16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

PATCHGEN_DEVICE float float16_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

PATCHGEN_DEVICE float bits_to_float(uint32_t bits) {
  return __uint_as_float(bits);
}

// ---- asynchronous copies from global to shared memory (sm_80)

// Copies `bytes` (0 to 16) and fills the rest of the 16 with zeros; both addresses 16-byte aligned.
PATCHGEN_DEVICE void copy_async_16(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}

// The same for 8 and 4 bytes, for rows that are not aligned to 16; these pass through L1.
PATCHGEN_DEVICE void copy_async_8(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}
PATCHGEN_DEVICE void copy_async_4(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

PATCHGEN_DEVICE void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most PENDING of this thread's newest groups are unfinished.
template <int PENDING>
PATCHGEN_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- matrix fragments from shared memory: 8x8 matrices of 16-bit elements, a row address a lane

PATCHGEN_DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

PATCHGEN_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

PATCHGEN_DEVICE void load_matrix_x2(uint32_t (&r)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
}

PATCHGEN_DEVICE void load_matrix_x2_transposed(uint32_t (&r)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
}

// ---- products: d[16, 8] += a[16, K] b[K, 8] in float32, K 16 or 8

#define PATCHGEN_MMA_K16(name, type)                                                           \
  PATCHGEN_DEVICE void name(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                        \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));              \
  }
#define PATCHGEN_MMA_K8(name, type)                                              \
  PATCHGEN_DEVICE void name(float (&d)[4], const uint32_t (&a)[2], uint32_t b) { \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." type "." type           \
                 ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"      \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                \
                 : "r"(a[0]), "r"(a[1]), "r"(b));                                \
  }
PATCHGEN_MMA_K16(mma_k16_bfloat16, "bf16")
PATCHGEN_MMA_K16(mma_k16_float16, "f16")
PATCHGEN_MMA_K8(mma_k8_bfloat16, "bf16")
PATCHGEN_MMA_K8(mma_k8_float16, "f16")
#undef PATCHGEN_MMA_K16
#undef PATCHGEN_MMA_K8

// ---- between the lanes of a warp, and between the blocks of a grid

PATCHGEN_DEVICE float shuffle_xor(float value, int lane_mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, lane_mask);
}

// Adds 1 to a counter in global memory and returns what it held; everything this thread wrote
// before is visible to whoever sees the new count.
PATCHGEN_DEVICE unsigned take_ticket(unsigned* counter) {
  __threadfence();
  unsigned ticket = atomicAdd(counter, 1u);
  __threadfence();
  return ticket;
}

}  // namespace patchgen_fast::cuda

#else
#include "emulator_ptx.h"
#endif
