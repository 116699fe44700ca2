// Reading patches straight from images: gathered, normalised and rounded on the way to shared
// memory, so that no matrix of patches is ever written.
#pragma once

#include "gemm_tile.cuh"
#include "patch_embed.h"

namespace patchgen_fast::cuda {

// A chunk of 8 pixels as loaded. Bytes are taken as they are: Normalise scales them.
template <class Image>
struct PixelWords {
  static constexpr int COUNT = CHUNK * static_cast<int>(sizeof(Image)) / 4;  // of a chunk
  uint32_t word[COUNT];

  // In float32.
  PATCHGEN_DEVICE float pixel(int i) const {
    if constexpr (sizeof(Image) == 1)
      return static_cast<float>(word[i / 4] >> (i % 4 * 8) & 0xFFu);
    else if constexpr (sizeof(Image) == 2)
      return unpack<Image>(word[i / 2], i % 2);
    else
      return bits_to_float(word[i]);
  }

  PATCHGEN_DEVICE void clear() {
    PATCHGEN_UNROLL
    for (int i = 0; i < COUNT; ++i) word[i] = 0;
  }

  // Loads TOGETHER adjacent pixels to place i; aligned to as many.
  template <int TOGETHER>
  PATCHGEN_DEVICE void load(int i, const Image* from) {
    constexpr int BYTES = TOGETHER * static_cast<int>(sizeof(Image));
    const int at = i * static_cast<int>(sizeof(Image));
    if constexpr (BYTES % 16 == 0) {
      PATCHGEN_UNROLL
      for (int j = 0; j < BYTES / 16; ++j) {
        uint4 four = reinterpret_cast<const uint4*>(from)[j];
        uint32_t* to = word + at / 4 + 4 * j;
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
      }
    } else if constexpr (BYTES == 8) {
      uint2 two = *reinterpret_cast<const uint2*>(from);
      word[at / 4] = two.x, word[at / 4 + 1] = two.y;
    } else if constexpr (BYTES == 4) {
      word[at / 4] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (BYTES == 2) {
      word[at / 4] |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(from))
                      << (at % 4 * 8);
    } else {
      word[at / 4] |= static_cast<uint32_t>(*reinterpret_cast<const uint8_t*>(from))
                      << (at % 4 * 8);
    }
  }
};

// normalised = pixel * scale + shift, of one channel.
struct alignas(8) Normalise {
  float scale, shift;
};

// Where a run of TOGETHER adjacent pixels lies within a patch.
struct alignas(8) Run {
  int offset;  // from the patch's first pixel, in elements
  int channel;
};

// The first pixel of a patch, as an offset into the images. Patches are counted over the batch.
PATCHGEN_DEVICE int64_t patch_offset(const PatchGeometry& g, int patch) {
  const int image = patch / g.patches();
  int rest = patch % g.patches();
  const int x = rest % g.grid_w;
  rest /= g.grid_w;
  const int y = rest % g.grid_h, t = rest / g.grid_h;
  return image * g.batch_stride + t * g.patch_t * g.time_stride + y * g.patch_h * g.row_stride +
         x * g.patch_w * g.column_stride;
}

// The row of a patch's token among the tokens of the batch.
PATCHGEN_DEVICE int64_t token_of(int patch, int patches, int prefix_tokens) {
  const int64_t image = patch / patches;
  return image * (prefix_tokens + patches) + prefix_tokens + patch % patches;
}

// What every thread of a block looks up, in shared memory: where its patches begin, where the runs
// of a patch lie, and how to normalise a channel.
constexpr int64_t NO_PATCH = INT64_MIN;

template <int TOGETHER>
struct PatchTable {
  uint32_t patches, runs, channels;  // addresses

  PATCHGEN_HOST_DEVICE static constexpr int bytes(int patch_count, int values, int channel_count) {
    return patch_count * static_cast<int>(sizeof(int64_t)) +
           ceil_div(values, TOGETHER) * static_cast<int>(sizeof(Run)) +
           channel_count * static_cast<int>(sizeof(Normalise));
  }

  PATCHGEN_DEVICE PatchTable(uint32_t memory, int patch_count, int values)
      : patches(memory),
        runs(patches + patch_count * static_cast<uint32_t>(sizeof(int64_t))),
        channels(runs + ceil_div(values, TOGETHER) * static_cast<uint32_t>(sizeof(Run))) {}

  PATCHGEN_DEVICE int64_t& patch(int i) const {
    return shared_at<int64_t>(patches + i * static_cast<uint32_t>(sizeof(int64_t)));
  }
  PATCHGEN_DEVICE Run& run(int i) const {
    return shared_at<Run>(runs + i * static_cast<uint32_t>(sizeof(Run)));
  }
  PATCHGEN_DEVICE Normalise& channel(int c) const {
    return shared_at<Normalise>(channels + c * static_cast<uint32_t>(sizeof(Normalise)));
  }

  // Slots from `slot` on: the patches from `first` on, of which those from `end` on do not exist.
  PATCHGEN_DEVICE void fill_patches(const PatchGeometry& g, int slot, int first, int end, int count,
                                    int thread) const {
    for (int i = thread; i < count; i += BlockTile::THREADS)
      patch(slot + i) = first + i < end ? patch_offset(g, first + i) : NO_PATCH;
  }

  PATCHGEN_DEVICE void fill_values(const PatchGeometry& g, int values, int thread) const {
    for (int i = thread; i * TOGETHER < values; i += BlockTile::THREADS) {
      int rest = i * TOGETHER;
      const int x = rest % g.patch_w;
      rest /= g.patch_w;
      const int y = rest % g.patch_h;
      rest /= g.patch_h;
      const int t = rest % g.patch_t, channel = rest / g.patch_t;
      const int64_t offset =
          channel * g.channel_stride + t * g.time_stride + y * g.row_stride + x * g.column_stride;
      run(i) = {static_cast<int>(offset), channel};
    }
    const float unit = g.image_dtype == DType::UINT8 ? 1.f / 255.f : 1.f;
    for (int c = thread; c < g.channels; c += BlockTile::THREADS) {
      const float inverse = 1.f / (g.std ? g.std[c] : 1.f);
      channel(c) = {unit * inverse, -(g.mean ? g.mean[c] : 0.f) * inverse};
    }
  }
};

// Brings ROWS patches by WIDTH values, a stage of an operand, to shared memory by way of registers,
// so that the loads of the next stage are under way while this one is multiplied.
template <class Image, class T, int TOGETHER, int ROWS, int WIDTH>
struct PatchLoader {
  static constexpr int CHUNKS = WIDTH / CHUNK;
  static constexpr int STEP = BlockTile::THREADS / CHUNKS;  // rows from one pass to the next
  static constexpr int PASSES = ROWS / STEP;
  static_assert(ROWS % STEP == 0);
  PixelWords<Image> pixels[PASSES];

  // Patches by their slots in the table, from `slot` on.
  PATCHGEN_DEVICE void fetch(const PatchGeometry& g, const PatchTable<TOGETHER>& table, int slot,
                             int values, int first_value, int thread) {
    const int value = first_value + thread % CHUNKS * CHUNK;
    PATCHGEN_UNROLL
    for (int pass = 0; pass < PASSES; ++pass) pixels[pass].clear();
    PATCHGEN_UNROLL
    for (int i = 0; i < CHUNK; i += TOGETHER) {
      if (value + i >= values) break;
      const int offset = table.run((value + i) / TOGETHER).offset;
      PATCHGEN_UNROLL
      for (int pass = 0; pass < PASSES; ++pass) {
        const int64_t first_pixel = table.patch(slot + thread / CHUNKS + pass * STEP);
        if (first_pixel != NO_PATCH)
          pixels[pass].template load<TOGETHER>(
              i, static_cast<const Image*>(g.images) + first_pixel + offset);
      }
    }
  }

  PATCHGEN_DEVICE void store(SharedRows<WIDTH> to, const PatchTable<TOGETHER>& table, int slot,
                             int values, int first_value, int thread) const {
    const int chunk = thread % CHUNKS, value = first_value + chunk * CHUNK;
    Normalise normalise[CHUNK / TOGETHER];  // zeros where there is no value
    PATCHGEN_UNROLL
    for (int i = 0; i < CHUNK / TOGETHER; ++i) {
      const int first = value + i * TOGETHER;
      normalise[i] =
          first < values ? table.channel(table.run(first / TOGETHER).channel) : Normalise{0.f, 0.f};
    }
    PATCHGEN_UNROLL
    for (int pass = 0; pass < PASSES; ++pass) {
      const bool inside = table.patch(slot + thread / CHUNKS + pass * STEP) != NO_PATCH;
      uint32_t packed[CHUNK / 2];
      PATCHGEN_UNROLL
      for (int i = 0; i < CHUNK; i += 2) {
        float pair[2];
        PATCHGEN_UNROLL
        for (int j = 0; j < 2; ++j) {
          const Normalise n = normalise[(i + j) / TOGETHER];
          pair[j] = inside ? fmaf(pixels[pass].pixel(i + j), n.scale, n.shift) : 0.f;
        }
        packed[i / 2] = pack<T>(pair[0], pair[1]);
      }
      shared_at<uint4>(to.at(thread / CHUNKS + pass * STEP, chunk)) = {packed[0], packed[1],
                                                                       packed[2], packed[3]};
    }
  }
};

}  // namespace patchgen_fast::cuda
