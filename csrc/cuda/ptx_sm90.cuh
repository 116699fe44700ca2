// What sm_90a adds: barriers in shared memory, tensor copies (TMA), and products of a warpgroup
// (wgmma). Thin wrappers as in ptx.cuh, with host twins in tests/cuda_host/emulator_sm90.h.
//
// Swizzle: rows of 128 bytes whose 16-byte chunks are permuted by the row, as SharedRows<64> lays
// them out; every operand begins at a multiple of 1024 bytes.
#pragma once

#include "tile.cuh"

#if defined(__CUDACC__)

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>

namespace patchgen_fast::cuda {

using TensorMap = CUtensorMap;

// ---- barriers in shared memory: 8 bytes that count arrivals, and bytes under way

PATCHGEN_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to asynchronous copies.
PATCHGEN_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and announces that `bytes` will be copied before the phase is over.
PATCHGEN_DEVICE void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity (0 for the first) is over.
PATCHGEN_DEVICE void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- tensor copies

// Orders this thread's accesses to shared memory before asynchronous copies that follow a barrier.
PATCHGEN_DEVICE void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Starts copying the map's box at (column, row, head, batch); what lies outside becomes zeros.
PATCHGEN_DEVICE void copy_box_async(uint32_t to, const TensorMap& map, uint32_t barrier, int column,
                                    int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// ---- products of a warpgroup

// Describes an operand in shared memory, swizzled by 128 bytes; groups of 8 rows are 1024 bytes
// apart. The distance along the rows is unused: all operands are one swizzle pattern wide.
PATCHGEN_DEVICE uint64_t swizzled_operand(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | uint64_t{1} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Before the first product of a sequence: registers are as this thread last wrote them.
PATCHGEN_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
PATCHGEN_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
PATCHGEN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define PATCHGEN_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PATCHGEN_8(d, i) PATCHGEN_4(d, i), PATCHGEN_4(d, i + 4)
#define PATCHGEN_16(d) PATCHGEN_8(d, 0), PATCHGEN_8(d, 8)
#define PATCHGEN_32(d) PATCHGEN_16(d), PATCHGEN_8(d, 16), PATCHGEN_8(d, 24)

// d[64, 16] (+)= a[64, 16] b[16, 16]; of each warp 16 rows, laid out as ptx.cuh's accumulators.
// b lies as rows of its columns (K-major). `add` false: d's contents do not matter.
#define PATCHGEN_WGMMA_16(name, type)                                                      \
  PATCHGEN_DEVICE void name(float* d, const uint32_t (&a)[4], uint64_t b, bool add) {      \
    asm volatile(                                                                          \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %13, 0;\n"                                   \
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type                        \
        " {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, add, 1, 1, 0;\n}"     \
        : PATCHGEN_8(d, 0)                                                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add))); \
  }
// The same for 32 columns.
#define PATCHGEN_WGMMA_32(name, type)                                                      \
  PATCHGEN_DEVICE void name(float* d, const uint32_t (&a)[4], uint64_t b, bool add) {      \
    asm volatile(                                                                          \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %21, 0;\n"                                   \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                        \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15},"         \
        " {%16, %17, %18, %19}, %20, add, 1, 1, 0;\n}"                                     \
        : PATCHGEN_16(d)                                                                   \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add))); \
  }
// Both with a in shared memory too, 64 rows (K-major).
#define PATCHGEN_WGMMA_SHARED_16(name, type)                              \
  PATCHGEN_DEVICE void name(float* d, uint64_t a, uint64_t b, bool add) { \
    asm volatile(                                                         \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %10, 0;\n"                  \
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type       \
        " {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, add, 1, 1, 0, 0;\n}"  \
        : PATCHGEN_8(d, 0)                                                \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));                    \
  }
#define PATCHGEN_WGMMA_SHARED_32(name, type)                                       \
  PATCHGEN_DEVICE void name(float* d, uint64_t a, uint64_t b, bool add) {          \
    asm volatile(                                                                  \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %18, 0;\n"                           \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}," \
        " %16, %17, add, 1, 1, 0, 0;\n}"                                           \
        : PATCHGEN_16(d)                                                           \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));                             \
  }
// As the first for 64 columns. TRANSPOSED "1": b lies as rows of the depth (MN-major).
#define PATCHGEN_WGMMA_64(name, type, transposed)                                          \
  PATCHGEN_DEVICE void name(float* d, const uint32_t (&a)[4], uint64_t b, bool add) {      \
    asm volatile(                                                                          \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                   \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                        \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16,"     \
        " %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"     \
        " {%32, %33, %34, %35}, %36, add, 1, 1, " transposed ";\n}"                        \
        : PATCHGEN_32(d)                                                                   \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add))); \
  }
PATCHGEN_WGMMA_16(wgmma_16_bfloat16, "bf16")
PATCHGEN_WGMMA_16(wgmma_16_float16, "f16")
PATCHGEN_WGMMA_32(wgmma_32_bfloat16, "bf16")
PATCHGEN_WGMMA_32(wgmma_32_float16, "f16")
PATCHGEN_WGMMA_SHARED_16(wgmma_16_bfloat16, "bf16")
PATCHGEN_WGMMA_SHARED_16(wgmma_16_float16, "f16")
PATCHGEN_WGMMA_SHARED_32(wgmma_32_bfloat16, "bf16")
PATCHGEN_WGMMA_SHARED_32(wgmma_32_float16, "f16")
PATCHGEN_WGMMA_64(wgmma_64_bfloat16, "bf16", "0")
PATCHGEN_WGMMA_64(wgmma_64_float16, "f16", "0")
PATCHGEN_WGMMA_64(wgmma_64_transposed_bfloat16, "bf16", "1")
PATCHGEN_WGMMA_64(wgmma_64_transposed_float16, "f16", "1")
#undef PATCHGEN_WGMMA_16
#undef PATCHGEN_WGMMA_32
#undef PATCHGEN_WGMMA_SHARED_16
#undef PATCHGEN_WGMMA_SHARED_32
#undef PATCHGEN_WGMMA_64

// ---- on the host side of a launch

// Describes a tensor [batch, heads, rows, columns] of 16-bit elements, strides in elements, from
// which boxes of box_rows x box_columns (128 bytes) are copied. Throws where the driver refuses it.
inline TensorMap make_tensor_map(const void* data, const int (&sizes)[4],
                                 const int64_t (&strides)[3], int box_rows, int box_columns) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  cuuint64_t dims[4], bytes[3];
  for (int i = 0; i < 4; ++i) dims[i] = static_cast<cuuint64_t>(sizes[3 - i]);
  for (int i = 0; i < 3; ++i)  // of a dimension of one the stride may be anything: 16 is valid
    bytes[i] = sizes[2 - i] == 1 ? 16 : static_cast<cuuint64_t>(strides[2 - i]) * 2;
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_columns),
                             static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  TensorMap map;
  if (!encode ||
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data), dims, bytes, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    throw std::runtime_error(
        "patchgen_fast: the driver refuses a tensor map\n"
        "Remedy: update the NVIDIA driver to 525 or later, or unset PATCHGEN_FAST_CUDA_WGMMA");
  return map;
}

}  // namespace patchgen_fast::cuda

#else
#include "emulator_sm90.h"
#endif

namespace patchgen_fast::cuda {

// The operand so many bytes on, a multiple of 16: one addition, where a new one takes several.
PATCHGEN_DEVICE uint64_t step_operand(uint64_t operand, uint32_t bytes) {
  return (operand >> 32 << 32) | (static_cast<uint32_t>(operand) + bytes / 16);
}

// scores[64, 16 TILES] (+)= a[64, 16] rows^T, where `rows` are 16 TILES keys from the address on.
PATCHGEN_DEVICE void wgmma_rows_64(bfloat16, float* d, const uint32_t (&a)[4], uint64_t b,
                                   bool add) {
  wgmma_64_bfloat16(d, a, b, add);
}
PATCHGEN_DEVICE void wgmma_rows_64(float16, float* d, const uint32_t (&a)[4], uint64_t b,
                                   bool add) {
  wgmma_64_float16(d, a, b, add);
}
PATCHGEN_DEVICE void wgmma_rows_16(bfloat16, float* d, const uint32_t (&a)[4], uint64_t b,
                                   bool add) {
  wgmma_16_bfloat16(d, a, b, add);
}
PATCHGEN_DEVICE void wgmma_rows_16(float16, float* d, const uint32_t (&a)[4], uint64_t b,
                                   bool add) {
  wgmma_16_float16(d, a, b, add);
}
// The same with 32 keys, and for either with `a` in registers or, described, in shared memory.
template <class Left>
PATCHGEN_DEVICE void wgmma_rows(bfloat16, Square (&d)[2], const Left& a, uint64_t b, bool add) {
  wgmma_32_bfloat16(d[0][0], a, b, add);
}
template <class Left>
PATCHGEN_DEVICE void wgmma_rows(float16, Square (&d)[2], const Left& a, uint64_t b, bool add) {
  wgmma_32_float16(d[0][0], a, b, add);
}
template <class Left>
PATCHGEN_DEVICE void wgmma_rows(bfloat16, Square (&d)[1], const Left& a, uint64_t b, bool add) {
  wgmma_16_bfloat16(d[0][0], a, b, add);
}
template <class Left>
PATCHGEN_DEVICE void wgmma_rows(float16, Square (&d)[1], const Left& a, uint64_t b, bool add) {
  wgmma_16_float16(d[0][0], a, b, add);
}
// d[64, 64] += a[64, 16] matrix[16, 64].
PATCHGEN_DEVICE void wgmma_matrix_64(bfloat16, float* d, const uint32_t (&a)[4], uint64_t b) {
  wgmma_64_transposed_bfloat16(d, a, b, true);
}
PATCHGEN_DEVICE void wgmma_matrix_64(float16, float* d, const uint32_t (&a)[4], uint64_t b) {
  wgmma_64_transposed_float16(d, a, b, true);
}

}  // namespace patchgen_fast::cuda
