// Attention of few queries (a step of generation) over many keys: a key-value cache is read once,
// at the speed of memory.
//
// The rows of a tile are queries of all heads that share a key-value head. The keys are split among
// blocks, and those of a block among its warps, each of which streams its own tiles of 16 keys and
// values with an online softmax. Partial results (greatest logit, sum, unnormalised output) are
// joined within the block, then by the block that finishes last, always in the same order.
//
// Bytes moved: key and value once; with more than one split, splits * (head_dim + 2) floats a row.
#pragma once

#include "softmax.cuh"

namespace patchgen_fast::cuda {

struct DecodeLayout {
  static constexpr int WARPS = 4;
  static constexpr int THREADS = WARPS * WARP;
  static constexpr int BLOCKS = 2;  // a multiprocessor, as registers must allow

  // Tiles of keys and values in use or on their way to a warp; 3 of the widest do not fit in the
  // 99 KiB of sm_86, 89 and 120.
  PATCHGEN_HOST_DEVICE static constexpr int stages(int width) { return width <= 96 ? 3 : 2; }
};

// Beside the stages and the queries; the partial results of the warps take the place of the stages.
template <int D>
PATCHGEN_HOST_DEVICE constexpr int decode_shared_bytes() {
  constexpr int ROWS = (1 + DecodeLayout::WARPS * DecodeLayout::stages(D) * 2) * TILE;
  static_assert(SharedRows<D>::bytes(ROWS - TILE) >=
                DecodeLayout::WARPS * TILE * (D + 2) * static_cast<int>(sizeof(float)));
  return SharedRows<D>::bytes(ROWS) + CHUNK_BYTES;  // and a ticket
}

// Joins `count` partial results of a row, `stride` floats apart: to output element d and, in
// `greatest` and `sum`, the row's statistics.
PATCHGEN_DEVICE float join_partials(const float* row, int64_t stride, int count, int width, int d,
                                    float& greatest, float& sum) {
  greatest = MINUS_INFINITY;
  for (int i = 0; i < count; ++i) greatest = fmaxf(greatest, row[i * stride + width]);
  const float finite = greatest == MINUS_INFINITY ? 0.f : greatest;
  float output = 0.f;
  sum = 0.f;
  for (int i = 0; i < count; ++i) {
    const float factor = exp2_approx((row[i * stride + width] - finite) * LOG2_E);
    output += row[i * stride + d] * factor;
    sum += row[i * stride + width + 1] * factor;
  }
  return output;
}

template <class T, int D>
PATCHGEN_KERNEL(DecodeLayout::THREADS, DecodeLayout::BLOCKS)
attention_decode_kernel(const AttentionForward p, const DecodeWork work) {
  constexpr int WARPS = DecodeLayout::WARPS, STAGES = DecodeLayout::stages(D);
  constexpr int PARTIAL = D + 2;  // floats of a row
  using Rows = SharedRows<D>;
  PATCHGEN_SHARED_MEMORY(memory);

  const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
  const int group = p.heads / p.kv_heads, all_rows = group * p.queries;
  const int row_tiles = ceil_div(all_rows, TILE);
  const int split = blockIdx.x % work.splits, row_tile = blockIdx.x / work.splits;
  const int first_row = row_tile % row_tiles * TILE, flat_kv_head = row_tile / row_tiles;
  const int batch = flat_kv_head / p.kv_heads, kv_head = flat_kv_head % p.kv_heads;
  const int rows = min_of(TILE, all_rows - first_row);
  auto head_of = [&](int row) { return kv_head * group + (first_row + row) / p.queries; };
  auto query_of = [&](int row) { return (first_row + row) % p.queries; };

  const uint32_t shared = shared_address(memory);
  const Rows staged_queries{shared};
  const uint32_t stages = shared + Rows::bytes(TILE);
  auto stage = [&](int tile, int which) {  // of this warp: keys (0) or values (1)
    return Rows{stages + Rows::bytes(((warp * STAGES + tile % STAGES) * 2 + which) * TILE)};
  };

  for (int i = thread; i < TILE * Rows::CHUNKS; i += DecodeLayout::THREADS) {
    const int row = i / Rows::CHUNKS, chunk = i % Rows::CHUNKS;
    const T* query = static_cast<const T*>(p.query);
    const bool inside = row < rows && chunk * CHUNK < p.head_dim;
    if (inside)
      query = rows_of<T>(p.query, p.query_stride, batch, head_of(row)) +
              query_of(row) * p.query_stride.row + chunk * CHUNK;
    copy_async_16(staged_queries.at(row, chunk), query, inside ? CHUNK_BYTES : 0);
  }
  copy_async_commit();

  // This split's tiles of 16 keys; the warps take turns.
  const int end_key = Visibility(p, whole_extent(p), batch, kv_head * group).limit(p.queries - 1);
  const int key_tiles = ceil_div(end_key, TILE), per_split = ceil_div(key_tiles, work.splits);
  const int first_tile = split * per_split + warp;
  const int end_tile = min_of(key_tiles, (split + 1) * per_split);
  const int steps = max_of(0, ceil_div(end_tile - first_tile, WARPS));
  const T* key = rows_of<T>(p.key, p.key_stride, batch, kv_head);
  const T* value = rows_of<T>(p.value, p.value_stride, batch, kv_head);
  auto fetch = [&](int step) {
    if (step < steps) {
      const int64_t first_key = (first_tile + step * WARPS) * TILE;
      const int keys = end_key - static_cast<int>(first_key);
      copy_rows_async<T, D>(stage(step, 0), key + first_key * p.key_stride.row, p.key_stride.row,
                            keys, TILE, p.head_dim, lane, WARP);
      copy_rows_async<T, D>(stage(step, 1), value + first_key * p.value_stride.row,
                            p.value_stride.row, keys, TILE, p.head_dim, lane, WARP);
    }
    copy_async_commit();
  };
  for (int step = 0; step < STAGES - 1; ++step) fetch(step);
  copy_async_wait<STAGES - 1>();  // the queries
  __syncthreads();

  LeftFragments<T, D> queries;
  queries.load(staged_queries, 0, lane);
  // A lane holds rows lane/4 and lane/4 + 8; those that do not exist stand for row 0.
  const LogitScale logit(p);
  const int row_of_half[2] = {lane / 4 < rows ? lane / 4 : 0,
                              lane / 4 + 8 < rows ? lane / 4 + 8 : 0};
  const Visibility view[2] = {Visibility(p, whole_extent(p), batch, head_of(row_of_half[0])),
                              Visibility(p, whole_extent(p), batch, head_of(row_of_half[1]))};

  RowAccumulators<D> output;
  output.clear();
  float greatest[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {0.f, 0.f};
  PATCHGEN_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<STAGES - 2>();
    __syncwarp();
    fetch(step + STAGES - 1);  // into the stage that every lane read out a step ago
    const int first_key = (first_tile + step * WARPS) * TILE;
    Square scores;
    multiply_rows(scores, queries, stage(step, 0), 0, lane);
    float factor[2];
    PATCHGEN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int query = query_of(row_of_half[half]), limit = view[half].limit(query);
      float tile_greatest = MINUS_INFINITY;
      PATCHGEN_UNROLL
      for (int n = 0; n < 2; ++n) PATCHGEN_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int at = first_key + 8 * n + lane % 4 * 2 + j;
        float score = scores[n][2 * half + j] * logit.scale;
        const bool seen = at < limit;
        if (view[half].kind != MaskKind::NONE && seen)
          score = view[half].template masked<T>(score, query, at);
        scores[n][2 * half + j] = seen ? score : MINUS_INFINITY;
        tile_greatest = fmaxf(tile_greatest, scores[n][2 * half + j]);
      }
      const float now = fmaxf(greatest[half], row_max(tile_greatest));
      const float finite = now == MINUS_INFINITY ? 0.f : now;
      factor[half] = exp2_approx((greatest[half] - finite) * LOG2_E);
      greatest[half] = now;
      sum[half] *= factor[half];
      PATCHGEN_UNROLL
      for (int n = 0; n < 2; ++n) PATCHGEN_UNROLL
      for (int j = 0; j < 2; ++j) {
        float& weight = scores[n][2 * half + j];
        weight = exp2_approx((weight - finite) * LOG2_E);
        sum[half] += weight;
      }
    }
    output.scale_rows(factor[0], factor[1]);
    uint32_t weights[4];
    to_left_operand<T>(weights, scores);
    output.template add_product<T>(weights, stage(step, 1), 0, lane);
  }
  copy_async_wait<0>();
  __syncthreads();  // the stages are read out: partial results take their place

  float* partial = &shared_at<float>(stages + warp * TILE * PARTIAL * 4u);
  PATCHGEN_UNROLL
  for (int half = 0; half < 2; ++half) {
    float* row = partial + (lane / 4 + 8 * half) * PARTIAL;
    PATCHGEN_UNROLL
    for (int n = 0; n < RowAccumulators<D>::PARTS; ++n) PATCHGEN_UNROLL
    for (int j = 0; j < 2; ++j) row[8 * n + lane % 4 * 2 + j] = output.part[n][2 * half + j];
    const float row_total = row_sum(sum[half]);
    if (lane % 4 == 0) {
      row[D] = greatest[half];
      row[D + 1] = row_total;
    }
  }
  __syncthreads();

  const float* from = &shared_at<float>(stages);
  int64_t stride = TILE * PARTIAL;
  int count = WARPS;
  if (work.splits > 1) {
    // The block's own part goes to memory; whoever comes last joins those of all blocks.
    float* all = work.partial + static_cast<int64_t>(row_tile) * work.splits * TILE * PARTIAL;
    for (int i = thread; i < TILE * D; i += DecodeLayout::THREADS) {
      const int row = i / D, d = i % D;
      float block_greatest, block_sum;
      float* to = all + (split * TILE + row) * PARTIAL;
      to[d] = join_partials(from + row * PARTIAL, stride, WARPS, D, d, block_greatest, block_sum);
      if (d == 0) {
        to[D] = block_greatest;
        to[D + 1] = block_sum;
      }
    }
    unsigned& ticket = shared_at<unsigned>(shared + decode_shared_bytes<D>() - CHUNK_BYTES);
    __syncthreads();
    if (thread == 0) ticket = take_ticket(work.tickets + row_tile);
    __syncthreads();
    if (ticket != static_cast<unsigned>(work.splits) - 1) return;
    from = all;
    count = work.splits;
  }
  for (int i = thread; i < rows * D; i += DecodeLayout::THREADS) {
    const int row = i / D, d = i % D, head = head_of(row), query = query_of(row);
    float row_greatest, row_total;
    const float joined =
        join_partials(from + row * PARTIAL, stride, count, D, d, row_greatest, row_total);
    if (d < p.head_dim)
      rows_of<T>(p.out, p.out_stride, batch, head)[query * p.out_stride.row + d] =
          from_float<T>(row_total > 0.f ? joined / row_total : 0.f);
    if (d == 0)
      p.lse[(static_cast<int64_t>(batch) * p.heads + head) * p.queries + query] =
          row_total > 0.f ? row_greatest + logf(row_total) : MINUS_INFINITY;
  }
}

}  // namespace patchgen_fast::cuda
