// Attention over short sequences, forward, for sm_90a: the products by wgmma, the copies by TMA.
//
// The same plan as attention_forward.cuh, with what Hopper changes: one warpgroup takes 64 queries
// at a time, the operands in shared memory are read once for four warps instead of once for each
// (which bounds mma.sync to about half of the matrix peak), and one thread starts all copies. The
// accumulators are laid out as those of mma.sync, so mask and softmax are the very same code.
//
// Queries come from registers, keys K-major and values MN-major from shared memory, all in rows of
// 128 bytes swizzled by TMA; a head dimension of 128 is two such columns side by side.
#pragma once

#include "ptx_sm90.cuh"
#include "softmax.cuh"

namespace patchgen_fast::cuda {

struct ForwardLayout90 {
  static constexpr int THREADS = 128;  // one warpgroup
  static constexpr int QUERIES = 64;
  static constexpr int COLUMNS = 64;  // of 16-bit elements in a swizzled row
  static constexpr int STAGES = 2;    // of queries

  PATCHGEN_HOST_DEVICE static constexpr int blocks(int width, int key_tiles) {
    return width <= 64 && key_tiles <= 8 ? 3 : 2;  // 13 tiles would spill 48 bytes
  }
  // A box of TMA has at most 256 rows, and whole groups of 8.
  PATCHGEN_HOST_DEVICE static constexpr int boxes(int key_tiles) { return key_tiles > 8 ? 2 : 1; }
};

// Bytes of `rows` swizzled rows.
PATCHGEN_HOST_DEVICE constexpr int swizzled_bytes(int rows) {
  return SharedRows<ForwardLayout90::COLUMNS>::bytes(rows);
}

template <int D, int KEY_TILES>
PATCHGEN_HOST_DEVICE constexpr int forward_shared_bytes_sm90() {
  using Layout = ForwardLayout90;
  constexpr int BARRIERS = 64;  // four of 8 bytes, and what keeps the size a multiple of 64
  return D / Layout::COLUMNS *
             swizzled_bytes(2 * KEY_TILES * TILE + Layout::STAGES * Layout::QUERIES) +
         BARRIERS;
}

// D: 64 or 128. A block takes the tiles of 64 queries share, share + shares, and so on.
template <class T, int D, int KEY_TILES>
PATCHGEN_KERNEL(ForwardLayout90::THREADS, ForwardLayout90::blocks(D, KEY_TILES))
attention_forward_sm90_kernel(const AttentionForward p, const __grid_constant__ TensorMap query_map,
                              const __grid_constant__ TensorMap key_map,
                              const __grid_constant__ TensorMap value_map, int shares) {
  // The other architectures of a build get an empty kernel: nothing launches it there.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Layout = ForwardLayout90;
  constexpr int KEYS = KEY_TILES * TILE, PARTS = D / Layout::COLUMNS;
  constexpr int BOXES = Layout::boxes(KEY_TILES), BOX_KEYS = KEYS / BOXES;
  using Rows = SharedRows<Layout::COLUMNS>;
  PATCHGEN_SHARED_MEMORY(memory);

  const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
  const int share = blockIdx.x % shares, flat_head = blockIdx.x / shares;
  const int batch = flat_head / p.heads, head = flat_head % p.heads;
  const int kv_head = head / (p.heads / p.kv_heads);
  const Visibility view(p, whole_extent(p), batch, head);
  const LogitScale logit(p);
  T* out = rows_of<T>(p.out, p.out_stride, batch, head);
  float* lse = p.lse + static_cast<int64_t>(flat_head) * p.queries;

  const uint32_t keys = shared_address(memory), values = keys + PARTS * swizzled_bytes(KEYS);
  const uint32_t queries = values + PARTS * swizzled_bytes(KEYS);
  auto query_stage = [&](int round) {
    return queries + round % Layout::STAGES * PARTS * swizzled_bytes(Layout::QUERIES);
  };
  const uint32_t barriers = queries + Layout::STAGES * PARTS * swizzled_bytes(Layout::QUERIES);
  const uint32_t keys_here = barriers, values_here = barriers + 8;
  auto queries_here = [&](int round) { return barriers + 16 + round % Layout::STAGES * 8; };

  const int query_tiles = ceil_div(p.queries, Layout::QUERIES);
  auto fetch_queries = [&](int round) {
    const int first = (share + round * shares) * Layout::QUERIES;
    barrier_expect(queries_here(round), PARTS * swizzled_bytes(Layout::QUERIES));
    for (int part = 0; part < PARTS; ++part)
      copy_box_async(query_stage(round) + part * swizzled_bytes(Layout::QUERIES), query_map,
                     queries_here(round), part * Layout::COLUMNS, first, head, batch);
  };
  auto fetch_heads = [&](uint32_t to, const TensorMap& map, uint32_t here) {
    barrier_expect(here, PARTS * swizzled_bytes(KEYS));
    for (int part = 0; part < PARTS; ++part)
      for (int box = 0; box < BOXES; ++box)
        copy_box_async(to + part * swizzled_bytes(KEYS) + box * swizzled_bytes(BOX_KEYS), map, here,
                       part * Layout::COLUMNS, box * BOX_KEYS, kv_head, batch);
  };

  if (thread == 0) {
    for (int i = 0; i < 4; ++i) barrier_init(barriers + 8 * i, 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (thread == 0) {
    fetch_queries(0);
    fetch_heads(keys, key_map, keys_here);
    fetch_heads(values, value_map, values_here);
  }
  barrier_wait(keys_here, 0);

  PATCHGEN_NO_UNROLL
  for (int round = 0; share + round * shares < query_tiles; ++round) {
    const int first_query = (share + round * shares) * Layout::QUERIES + warp * TILE;
    barrier_wait(queries_here(round), round / Layout::STAGES % 2);
    // The other stage was read out before the barrier that ended the last round.
    if (thread == 0 && share + (round + 1) * shares < query_tiles) fetch_queries(round + 1);
    LeftFragments<T, Layout::COLUMNS> left[PARTS];
    PATCHGEN_UNROLL
    for (int part = 0; part < PARTS; ++part)
      left[part].load(Rows{query_stage(round) + part * swizzled_bytes(Layout::QUERIES)},
                      warp * TILE, lane);

    Square scores[KEY_TILES];
    wgmma_fence();
    PATCHGEN_UNROLL
    for (int part = 0; part < PARTS; ++part) PATCHGEN_UNROLL
    for (int k = 0; k < Layout::COLUMNS / 16; ++k) {
      const uint32_t column = keys + part * swizzled_bytes(KEYS) + k * 32;
      PATCHGEN_UNROLL
      for (int t = 0; t < KEY_TILES; t += KEY_TILES - t >= 4 ? 4 : 1) {
        const uint64_t rows = swizzled_operand(column + swizzled_bytes(t * TILE));
        if (KEY_TILES - t >= 4)
          wgmma_rows_64(T{}, scores[t][0], left[part].held[k], rows, part + k > 0);
        else
          wgmma_rows_16(T{}, scores[t][0], left[part].held[k], rows, part + k > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();

    PATCHGEN_UNROLL
    for (int t = 0; t < KEY_TILES; ++t)
      mask_scores<T, false>(scores[t], view, logit, first_query, t * TILE, lane);
    uint32_t weights[KEY_TILES][4];
    const RowStatistics row = softmax_rows<T, KEY_TILES>(weights, scores, logit);

    if (round == 0) barrier_wait(values_here, 0);
    RowAccumulators<Layout::COLUMNS> sum[PARTS];
    PATCHGEN_UNROLL
    for (int part = 0; part < PARTS; ++part) sum[part].clear();
    wgmma_fence();
    PATCHGEN_UNROLL
    for (int t = 0; t < KEY_TILES; ++t) PATCHGEN_UNROLL
    for (int part = 0; part < PARTS; ++part)
      wgmma_matrix_64(
          T{}, sum[part].part[0], weights[t],
          swizzled_operand(values + part * swizzled_bytes(KEYS) + swizzled_bytes(t * TILE)));
    wgmma_commit();
    wgmma_wait<0>();

    // Results are staged where this warp's queries lay.
    PATCHGEN_UNROLL
    for (int part = 0; part < PARTS; ++part) {
      const Rows stage{query_stage(round) + part * swizzled_bytes(Layout::QUERIES) +
                       swizzled_bytes(warp * TILE)};
      const int column = part * Layout::COLUMNS;
      sum[part].scale_rows(row.inverse_sum(0), row.inverse_sum(1));
      sum[part].template store<T>(stage, out + first_query * p.out_stride.row + column,
                                  p.out_stride.row, p.queries - first_query, p.head_dim - column,
                                  lane);
    }
    PATCHGEN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = first_query + lane / 4 + 8 * half;
      if (lane % 4 == 0 && i < p.queries) lse[i] = row.log_sum_exp(half);
    }
    async_proxy_fence();  // the stage goes to a copy again
    __syncthreads();
  }
#endif
}

}  // namespace patchgen_fast::cuda
