// Attention over short sequences, forward: out = softmax(scale query key^T + mask) value.
//
// One block owns a head (or, where there are few heads, a share of its query tiles): keys and
// values lie in shared memory, loaded once; a warp takes 16 queries at a time, holds their whole
// rows of scores in registers, and so needs neither a second pass nor a rescaling. Tiles are 16
// wide: at 197 tokens 90 % of the products are useful.
//
// Bytes moved: query, key, value read once, out and lse written once.
// Sums are float32; softmax weights are rounded to T before they are multiplied with the values.
#pragma once

#include "softmax.cuh"

namespace patchgen_fast::cuda {

struct ForwardLayout {
  static constexpr int WARPS = 4;
  static constexpr int THREADS = WARPS * WARP;
  // Blocks a multiprocessor that registers must leave room for: three overlap one another's copies
  // and exponentials better than two, where that needs no spilling.
  PATCHGEN_HOST_DEVICE static constexpr int blocks(int width, int key_tiles) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    return 2;
#else
    return (width <= 64 && key_tiles <= 13) || (width <= 96 && key_tiles <= 8) ? 3 : 2;
#endif
  }
};

// Shared memory: keys, values, and for each warp two tiles of queries (one in use, one on its way).
template <int D>
constexpr int forward_shared_bytes(int keys) {
  return SharedRows<D>::bytes(2 * round_up(keys, TILE) + ForwardLayout::WARPS * 2 * TILE);
}

// D: head_dim rounded up to a width we have. KEY_TILES: the most tiles of 16 keys.
// A block takes the query tiles share * WARPS + warp, and every shares * WARPS after.
template <class T, int D, int KEY_TILES>
PATCHGEN_KERNEL(ForwardLayout::THREADS, ForwardLayout::blocks(D, KEY_TILES))
attention_forward_kernel(const AttentionForward p, int shares) {
  constexpr int WARPS = ForwardLayout::WARPS, THREADS = ForwardLayout::THREADS;
  using Rows = SharedRows<D>;
  PATCHGEN_SHARED_MEMORY(memory);

  const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
  const int share = blockIdx.x % shares, flat_head = blockIdx.x / shares;
  const int batch = flat_head / p.heads, head = flat_head % p.heads;
  const int kv_head = head / (p.heads / p.kv_heads);
  const Extent extent = extent_of(p, batch);
  const Visibility view(p, extent, batch, head);
  const LogitScale logit(p);

  const T* query = rows_of<T>(p.query, p.query_stride, batch, head, extent.first_query);
  const T* key = rows_of<T>(p.key, p.key_stride, batch, kv_head, extent.first_key);
  const T* value = rows_of<T>(p.value, p.value_stride, batch, kv_head, extent.first_key);
  T* out = rows_of<T>(p.out, p.out_stride, batch, head, extent.first_query);
  float* lse = p.lse + lse_row(p, extent, batch, head);

  const int padded_keys = round_up(view.keys, TILE);
  const uint32_t shared = shared_address(memory);
  const Rows keys{shared}, values{shared + Rows::bytes(padded_keys)};
  const uint32_t own = shared + Rows::bytes(2 * padded_keys + warp * 2 * TILE);
  Rows current{own}, next{own + Rows::bytes(TILE)};

  const int query_tiles = ceil_div(view.queries, TILE);
  auto fetch_queries = [&](Rows to, int tile) {
    if (tile < query_tiles)
      copy_rows_async<T, D>(to, query + tile * TILE * p.query_stride.row, p.query_stride.row,
                            view.queries - tile * TILE, TILE, p.head_dim, lane, WARP);
  };

  const int first_tile = share * WARPS + warp;
  fetch_queries(current, first_tile);
  copy_rows_async<T, D>(keys, key, p.key_stride.row, view.keys, padded_keys, p.head_dim, thread,
                        THREADS);
  copy_async_commit();
  copy_rows_async<T, D>(values, value, p.value_stride.row, view.keys, padded_keys, p.head_dim,
                        thread, THREADS);
  copy_async_commit();
  copy_async_wait<1>();  // queries and keys are here; the values may still be on their way
  __syncthreads();

  bool values_ready = false;
  PATCHGEN_NO_UNROLL
  for (int block_tile = share * WARPS; block_tile < query_tiles; block_tile += shares * WARPS) {
    const int tile = block_tile + warp, first_query = tile * TILE;
    const bool active = tile < query_tiles;
    const int key_tiles = active ? ceil_div(view.tile_limit(first_query), TILE) : 0;

    fetch_queries(next, tile + shares * WARPS);
    copy_async_commit();

    uint32_t weights[KEY_TILES][4];
    RowStatistics row;
    if (active) {
      LeftFragments<T, D> queries;
      queries.load(current, 0, lane);

      Square scores[KEY_TILES];
      PATCHGEN_UNROLL
      for (int t = 0; t < KEY_TILES; ++t) fill(scores[t], MINUS_INFINITY);
      PATCHGEN_UNROLL
      for (int t = 0; t < KEY_TILES; ++t) {
        if (t >= key_tiles) break;
        multiply_rows(scores[t], queries, keys, t * TILE, lane);
        mask_scores<T, false>(scores[t], view, logit, first_query, t * TILE, lane);
      }
      row = softmax_rows<T, KEY_TILES>(weights, scores, logit);
    }

    if (!values_ready) {     // the same for every thread of the block: the first round
      copy_async_wait<1>();  // all but the next queries
      __syncthreads();
      values_ready = true;
    }
    if (active) {
      RowAccumulators<D> sum;
      sum.clear();
      PATCHGEN_UNROLL
      for (int t = 0; t < KEY_TILES; ++t) {
        if (t >= key_tiles) break;
        sum.template add_product<T>(weights[t], values, t * TILE, lane);
      }

      sum.scale_rows(row.inverse_sum(0), row.inverse_sum(1));
      __syncwarp();  // every lane has its queries: their place may be written over
      sum.template store<T>(current, out + first_query * p.out_stride.row, p.out_stride.row,
                            view.queries - first_query, p.head_dim, lane);
      PATCHGEN_UNROLL
      for (int half = 0; half < 2; ++half) {
        int i = first_query + lane / 4 + 8 * half;
        if (lane % 4 == 0 && i < view.queries) lse[i] = row.log_sum_exp(half);
      }
      copy_async_wait<0>();
      __syncwarp();  // the next queries are here, and `current` is read out
      Rows swap = current;
      current = next;
      next = swap;
    }
  }
}

}  // namespace patchgen_fast::cuda
