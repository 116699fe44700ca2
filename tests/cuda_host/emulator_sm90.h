// Host twins of csrc/cuda/ptx_sm90.cuh: barriers in memory, tensor copies, wgmma.
//
// Tensor copies land when no thread can go on without them, in any order (or at once), and count
// down their barrier.
// Products read shared memory and write registers when they are waited for (or when committed).
#pragma once

#include "emulator_ptx.h"

namespace patchgen_fast::cuda {

// ---- barriers in shared memory

struct MemoryBarrier {
  uint32_t phase : 1, arrivals : 15, pending : 16;
  int32_t bytes;  // announced and not yet copied

  void advance() {
    if (pending != 0 || bytes != 0) return;
    phase ^= 1;
    pending = arrivals;
  }
};
static_assert(sizeof(MemoryBarrier) == 8);

inline void barrier_init(uint32_t barrier, int arrivals) {
  shared_at<MemoryBarrier>(barrier) = {0, static_cast<uint32_t>(arrivals),
                                       static_cast<uint32_t>(arrivals), 0};
}
inline void barrier_init_fence() {}
inline void async_proxy_fence() {}

inline void barrier_expect(uint32_t barrier, int bytes) {
  MemoryBarrier& b = shared_at<MemoryBarrier>(barrier);
  require(b.pending > 0, "mbarrier: more arrivals than it was initialised for");
  b.bytes += bytes;
  b.pending -= 1;
  b.advance();
}

inline void barrier_wait(uint32_t barrier, int parity) {
  emulator::Block& block = *emulator::current_block();
  if (block.leaves_out(emulator::Sync::MEMORY_BARRIER)) return;
  while (shared_at<MemoryBarrier>(barrier).phase == static_cast<uint32_t>(parity))
    block.wait_as(emulator::State::POLLING);
}

// ---- tensor copies

struct TensorMap {
  const char* data;
  int sizes[4];        // batch, heads, rows, columns
  int64_t strides[3];  // elements
  int box_rows, box_columns;
};

inline TensorMap make_tensor_map(const void* data, const int (&sizes)[4],
                                 const int64_t (&strides)[3], int box_rows, int box_columns) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || box_rows > 256 || box_columns * 2 != 128)
    throw std::runtime_error("tensor map: not a valid one");
  TensorMap map{static_cast<const char*>(data), {}, {}, box_rows, box_columns};
  std::copy_n(sizes, 4, map.sizes);
  std::copy_n(strides, 3, map.strides);
  return map;
}

// The 128-byte swizzle: bits 4 to 6 of an address are xor-ed with bits 7 to 9.
inline uint32_t swizzled(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

inline void copy_box_async(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row,
                           int head, int batch) {
  require(to % 1024 == 0, "TMA: swizzled box not aligned to 1024 bytes");
  auto land = [=, &map] {
    const int start[4] = {batch, head, row, column};
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < map.box_columns; ++c) {
        const int at[4] = {start[0], start[1], start[2] + r, start[3] + c};
        bool inside = true;
        int64_t offset = at[3];
        for (int i = 0; i < 4; ++i) inside &= 0 <= at[i] && at[i] < map.sizes[i];
        for (int i = 0; i < 3; ++i) offset += at[i] * map.strides[i];
        uint16_t value = 0;
        if (inside) std::memcpy(&value, map.data + offset * 2, 2);
        shared_at<uint16_t>(swizzled(to + (r * map.box_columns + c) * 2)) = value;
      }
    MemoryBarrier& b = shared_at<MemoryBarrier>(barrier);
    b.bytes -= map.box_rows * map.box_columns * 2;
    b.advance();
  };
  emulator::Block& block = *emulator::current_block();
  if (block.options.copies == emulator::Timing::EARLY)
    land();
  else
    block.events.push_back(land);
}

// ---- products of a warpgroup

inline uint64_t swizzled_operand(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | uint64_t{1} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Element (depth, column) of an operand that a descriptor describes.
inline float operand_element(uint64_t b, bool transposed, bool bf16, int depth, int column) {
  require(b >> 62 == 1, "wgmma: operand is not swizzled by 128 bytes");
  const uint32_t start = static_cast<uint32_t>(b & 0x3FFF) << 4;
  const uint32_t groups = static_cast<uint32_t>(b >> 32 & 0x3FFF) << 4;  // of 8 rows
  const int row = transposed ? depth : column, along = transposed ? column : depth;
  require(along < 64, "wgmma: operand wider than its swizzle");
  const uint32_t address = start + row / 8 * groups + row % 8 * 128 + along * 2;
  return half_of(shared_at<uint16_t>(swizzled(address)), 0, bf16);
}

inline void carry_out(emulator::Lane* lanes, size_t which) {
  const emulator::WarpgroupProduct first = lanes[0].products.front()[which];
  std::vector<float> b(16 * first.columns);
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < first.columns; ++n)
      b[k * first.columns + n] = operand_element(first.b, first.transposed, first.bfloat16, k, n);
  for (int warp = 0; warp < 4; ++warp) {
    float a[16][16];
    if (first.shared_a)
      for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
          a[row][k] = operand_element(first.shared_a, false, first.bfloat16, k, warp * 16 + row);
    for (int l = 0; l < 32 && !first.shared_a; ++l)
      for (int part = 0; part < 4; ++part)
        for (int half = 0; half < 2; ++half)
          a[l / 4 + part % 2 * 8][l % 4 * 2 + part / 2 * 8 + half] =
              half_of(lanes[warp * 32 + l].products.front()[which].a[part], half, first.bfloat16);
    for (int l = 0; l < 32; ++l) {
      const emulator::WarpgroupProduct& product = lanes[warp * 32 + l].products.front()[which];
      require(product.b == first.b && product.shared_a == first.shared_a,
              "wgmma: lanes describe different operands");
      for (int i = 0; i < first.columns / 2; ++i) {
        const int row = l / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + l % 4 * 2 + i % 2;
        float sum = product.add ? product.d[i] : 0.f;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k * first.columns + column];
        product.d[i] = sum;
      }
    }
  }
  ++emulator::current_block()->report.products;
}

// Carries out all but the newest `pending` groups, for the 128 lanes together.
inline void finish_products(int pending) {
  int nothing = 0;
  emulator::warpgroup_instruction(nothing, [pending](int**) {
    emulator::Block& block = *emulator::current_block();
    emulator::Lane* lanes = &block.lanes[block.current / 128 * 128];
    while (static_cast<int>(lanes[0].products.size()) - 1 > pending) {
      for (size_t i = 0; i < lanes[0].products.front().size(); ++i) carry_out(lanes, i);
      for (int l = 0; l < 128; ++l) lanes[l].products.erase(lanes[l].products.begin());
    }
  });
}

inline void wgmma_fence() {}
inline void wgmma_commit() {
  emulator::Block& block = *emulator::current_block();
  block.lane().products.emplace_back();
  if (block.options.copies == emulator::Timing::EARLY) finish_products(0);
}
template <int PENDING>
inline void wgmma_wait() {
  if (emulator::current_block()->leaves_out(emulator::Sync::COPY_WAIT)) return;
  finish_products(PENDING);
}

// The operand of a product, or, where a test leaves out this step, that of the last one.
inline uint64_t stepped(uint64_t operand, uint64_t& last) {
  if (!emulator::current_block()->leaves_out(emulator::Sync::DESCRIPTOR_STEP)) last = operand;
  return last;
}

inline void wgmma(emulator::WarpgroupProduct product) {
  // Until it is waited for, a fresh result is not there.
  if (!product.add) std::fill_n(product.d, product.columns / 2, NAN);
  emulator::Lane& lane = emulator::current_block()->lane();
  if (product.shared_a) product.shared_a = stepped(product.shared_a, lane.left_descriptor);
  product.b = stepped(product.b, lane.descriptor);
  lane.products.back().push_back(product);
}

// a in registers, and in shared memory.
#define EMULATED_WGMMA(name, columns, transposed, bf16)                         \
  inline void name(float* d, const uint32_t (&a)[4], uint64_t b, bool add) {    \
    wgmma({d, {a[0], a[1], a[2], a[3]}, 0, b, columns, transposed, bf16, add}); \
  }
#define EMULATED_WGMMA_SHARED(name, columns, bf16)               \
  inline void name(float* d, uint64_t a, uint64_t b, bool add) { \
    wgmma({d, {}, a, b, columns, false, bf16, add});             \
  }
EMULATED_WGMMA(wgmma_16_bfloat16, 16, false, true)
EMULATED_WGMMA(wgmma_16_float16, 16, false, false)
EMULATED_WGMMA(wgmma_32_bfloat16, 32, false, true)
EMULATED_WGMMA(wgmma_32_float16, 32, false, false)
EMULATED_WGMMA(wgmma_64_bfloat16, 64, false, true)
EMULATED_WGMMA(wgmma_64_float16, 64, false, false)
EMULATED_WGMMA(wgmma_64_transposed_bfloat16, 64, true, true)
EMULATED_WGMMA(wgmma_64_transposed_float16, 64, true, false)
EMULATED_WGMMA_SHARED(wgmma_16_bfloat16, 16, true)
EMULATED_WGMMA_SHARED(wgmma_16_float16, 16, false)
EMULATED_WGMMA_SHARED(wgmma_32_bfloat16, 32, true)
EMULATED_WGMMA_SHARED(wgmma_32_float16, 32, false)
#undef EMULATED_WGMMA
#undef EMULATED_WGMMA_SHARED

}  // namespace patchgen_fast::cuda

#define __grid_constant__
