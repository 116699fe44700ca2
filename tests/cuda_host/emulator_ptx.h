// Host twins of csrc/cuda/ptx.cuh: the same names, carried out by the emulator.
#pragma once

#include "emulator.h"

#define PATCHGEN_DEVICE inline
#define PATCHGEN_HOST_DEVICE
#define PATCHGEN_UNROLL
#define PATCHGEN_NO_UNROLL
#define PATCHGEN_UNROLL_BY(count)
#define PATCHGEN_KERNEL(threads, min_blocks) inline void
#define PATCHGEN_SHARED_MEMORY(name) char* name = emulator::current_block()->shared()

namespace patchgen_fast::cuda {

// ---- shared memory: an address is an offset into the block's

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) -
                               emulator::current_block()->shared());
}
template <class T>
inline T& shared_at(uint32_t address) {
  return *reinterpret_cast<T*>(emulator::current_block()->shared() + address);
}

inline int opaque(int x) {
  return x;
}

// ---- arithmetic

inline float exp2_approx(float x) {
  return std::exp2(x);
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline uint16_t round_to_bfloat16(float value) {
  uint32_t bits = float_to_bits(value);
  if (value != value) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float float16_to_float(uint16_t bits) {
  uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  int exponent = (bits >> 10) & 31;
  float fraction = static_cast<float>(bits & 1023);
  float magnitude = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                    : exponent == 0 ? std::ldexp(fraction, -24)
                                    : std::ldexp(1024 + fraction, exponent - 25);
  return bits_to_float(float_to_bits(magnitude) | sign);
}

inline uint16_t round_to_float16(float value) {
  uint16_t sign = static_cast<uint16_t>(float_to_bits(value) >> 16 & 0x8000);
  float magnitude = std::fabs(value);
  if (value != value) return 0x7FFF;
  if (magnitude >= 65520.f) return sign | 0x7C00;
  int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  // A multiple of the last place, to nearest even as the host's rounding mode is.
  float units = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  return sign | static_cast<uint16_t>(units + (exponent + 14) * 1024);
}

inline uint32_t pack_bfloat16(float low, float high) {
  return round_to_bfloat16(low) | static_cast<uint32_t>(round_to_bfloat16(high)) << 16;
}
inline uint32_t pack_float16(float low, float high) {
  return round_to_float16(low) | static_cast<uint32_t>(round_to_float16(high)) << 16;
}

// ---- asynchronous copies

inline void require(bool holds, const char* what) {
  if (!holds) emulator::current_block()->fail(what);
}

inline void land(const emulator::PendingCopy& copy) {
  std::memcpy(copy.shared, copy.global, copy.bytes);
  std::memset(static_cast<char*>(copy.shared) + copy.bytes, 0, copy.size - copy.bytes);
}

template <int SIZE>
inline void copy_async(uint32_t shared, const void* global, int bytes) {
  require(shared % SIZE == 0, "cp.async: shared address not aligned");
  require(reinterpret_cast<uintptr_t>(global) % SIZE == 0, "cp.async: global address not aligned");
  require(0 <= bytes && bytes <= SIZE, "cp.async: more bytes than its size");
  emulator::Block& block = *emulator::current_block();
  emulator::PendingCopy copy{&shared_at<char>(shared), global, bytes, SIZE};
  if (block.options.copies == emulator::Timing::EARLY)
    land(copy);
  else
    block.lane().copy_groups.back().push_back(copy);
}
inline void copy_async_16(uint32_t shared, const void* global, int bytes) {
  copy_async<16>(shared, global, bytes);
}
inline void copy_async_8(uint32_t shared, const void* global, int bytes) {
  copy_async<8>(shared, global, bytes);
}
inline void copy_async_4(uint32_t shared, const void* global, int bytes) {
  copy_async<4>(shared, global, bytes);
}

inline void copy_async_commit() {
  emulator::current_block()->lane().copy_groups.emplace_back();
}

template <int PENDING>
inline void copy_async_wait() {
  if (emulator::current_block()->leaves_out(emulator::Sync::COPY_WAIT)) return;
  auto& groups = emulator::current_block()->lane().copy_groups;
  while (static_cast<int>(groups.size()) - 1 > PENDING) {
    for (const auto& copy : groups.front()) land(copy);
    groups.erase(groups.begin());
  }
}

// ---- matrix fragments

struct MatrixLoad {
  uint16_t row[8];
  uint32_t address;
  uint32_t* result;
};

// Lane 8 m + r gives row r of matrix m; of each matrix, lane l receives elements 2(l%4) and
// 2(l%4) + 1 of row l/4, or when transposed of column l/4. A lane's row is read when the lane comes
// to the instruction, not when the last one does: what another lane has yet to make visible is
// not seen.
template <int MATRICES, bool TRANSPOSED>
inline void load_matrices(uint32_t* result, uint32_t row) {
  MatrixLoad mine{{}, row, result};
  if (emulator::current_block()->lane_in_warp() < MATRICES * 8) {
    require(row % 16 == 0, "ldmatrix: row not aligned");
    std::memcpy(mine.row, &shared_at<char>(row), 16);
  }
  emulator::warp_instruction(mine, [](MatrixLoad** lanes) {
    emulator::Report& report = emulator::current_block()->report;
    for (int matrix = 0; matrix < MATRICES; ++matrix) {
      uint16_t element[8][8];
      int rows_in_bank[8] = {};
      for (int r = 0; r < 8; ++r) {
        const MatrixLoad& source = *lanes[matrix * 8 + r];
        std::memcpy(element[r], source.row, 16);
        ++rows_in_bank[source.address / 16 % 8];
      }
      ++report.matrices_loaded;
      report.wavefronts += *std::max_element(rows_in_bank, rows_in_bank + 8);
      for (int l = 0; l < 32; ++l) {
        int r = l / 4, c = l % 4 * 2;
        uint16_t low = TRANSPOSED ? element[c][r] : element[r][c];
        uint16_t high = TRANSPOSED ? element[c + 1][r] : element[r][c + 1];
        lanes[l]->result[matrix] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

inline void load_matrix_x4(uint32_t (&r)[4], uint32_t row) {
  load_matrices<4, false>(r, row);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t row) {
  load_matrices<4, true>(r, row);
}
inline void load_matrix_x2(uint32_t (&r)[2], uint32_t row) {
  load_matrices<2, false>(r, row);
}
inline void load_matrix_x2_transposed(uint32_t (&r)[2], uint32_t row) {
  load_matrices<2, true>(r, row);
}

// ---- products

inline float half_of(uint32_t packed, int half, bool bfloat16) {
  uint16_t bits = static_cast<uint16_t>(half ? packed >> 16 : packed & 0xFFFF);
  return bfloat16 ? bits_to_float(static_cast<uint32_t>(bits) << 16) : float16_to_float(bits);
}

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <int K, bool BFLOAT16>
inline void multiply_warp(Product mine) {
  emulator::warp_instruction(mine, [](Product** lanes) {
    float a[16][K], b[K][8];
    for (int l = 0; l < 32; ++l) {
      int row = l / 4, column = l % 4 * 2;
      for (int part = 0; part < K / 4; ++part)  // rows + 8 alternate, then columns + 8
        for (int half = 0; half < 2; ++half)
          a[row + part % 2 * 8][column + part / 2 * 8 + half] =
              half_of(lanes[l]->a[part], half, BFLOAT16);
      for (int part = 0; part < K / 8; ++part)
        for (int half = 0; half < 2; ++half)
          b[column + part * 8 + half][row] = half_of(lanes[l]->b[part], half, BFLOAT16);
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        float sum = lanes[l]->d[i];
        for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
        lanes[l]->d[i] = sum;
      }
    ++emulator::current_block()->report.products;
  });
}

inline void mma_k16_bfloat16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_warp<16, true>({d, a, {b0, b1}});
}
inline void mma_k16_float16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_warp<16, false>({d, a, {b0, b1}});
}
inline void mma_k8_bfloat16(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  multiply_warp<8, true>({d, a, {b, 0}});
}
inline void mma_k8_float16(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  multiply_warp<8, false>({d, a, {b, 0}});
}

// ---- between lanes and blocks

struct Shuffle {
  float value, result;
  int lane_mask;
};

inline float shuffle_xor(float value, int lane_mask) {
  Shuffle mine{value, 0, lane_mask};
  emulator::warp_instruction(mine, [](Shuffle** lanes) {
    for (int l = 0; l < 32; ++l) lanes[l]->result = lanes[l ^ lanes[l]->lane_mask]->value;
  });
  return mine.result;
}

// Blocks run one after another here, so a plain increment is atomic.
inline unsigned take_ticket(unsigned* counter) {
  return (*counter)++;
}

}  // namespace patchgen_fast::cuda
