// Attention over short sequences, backward, for sm_90a: the products by wgmma, the copies by TMA.
//
// The method is that of attention_backward.cuh (weights computed again from the log-sum-exp, as
// FlashAttention does; Dao et al., 2022), and so are the two passes, each sum in the registers of
// one warpgroup:
//   rows:    keys and values resident; a warpgroup takes 64 queries and sums grad_query
//   columns: queries and grad_out resident; a warpgroup takes 64 keys and sums grad_key and
//            grad_value
// Here too there is nothing to exchange: no atomics, no workspace, one order of every sum. A single
// pass of 5 products instead of 7 would hold grad_key and grad_value of all keys at once, half of
// the registers: one block a multiprocessor, and nothing to do while it waits for its copies.
//
// The scores of a warpgroup's 64 rows are taken 32 columns at a time, and what was computed stays,
// register for register, the left operand of the next product. Queries, keys and their like are
// left operands from registers at a width of 64, which leaves room for three blocks a
// multiprocessor; at 128, where a block is two warpgroups, from shared memory.
#pragma once

#include "attention_backward.cuh"
#include "plan.h"
#include "warpgroup_tile.cuh"

namespace patchgen_fast::cuda {

struct BackwardLayout90 {
  static constexpr int CHUNK_TILES = 2;           // of 16 columns of scores
  static constexpr int RESIDENT = 2, STAGED = 2;  // matrices; STAGED are of 64 rows a warpgroup

  // At 128 one block fills the shared memory: two warpgroups share what is resident.
  PATCHGEN_HOST_DEVICE static constexpr int warpgroups(int width) { return width <= 64 ? 1 : 2; }
  PATCHGEN_HOST_DEVICE static constexpr int threads(int width) {
    return warpgroups(width) * WARPGROUP;
  }
  PATCHGEN_HOST_DEVICE static constexpr int blocks(int width) { return width <= 64 ? 3 : 1; }
  PATCHGEN_HOST_DEVICE static constexpr bool holds_fragments(int width) { return width <= 64; }
};

// Of two adjacent queries: a lane's columns come in pairs. See RowFacts.
struct alignas(16) PairFacts {
  float shift[2], delta[2];  // one load
  float greatest[2];         // for additive masks
  float unused[2];
};

template <int D>
PATCHGEN_HOST_DEVICE constexpr int backward_shared_bytes_sm90(int queries, int keys, int group) {
  using Layout = BackwardLayout90;
  constexpr int BARRIERS = 64;
  const int longest = round_up(queries > keys ? queries : keys, TILE);
  const int rows =
      Layout::RESIDENT * longest + Layout::warpgroups(D) * Layout::STAGED * WARPGROUP_ROWS;
  const int pairs = group * round_up(queries, WARPGROUP_ROWS) / 2;
  return D / PART * part_bytes(rows) + pairs * static_cast<int>(sizeof(PairFacts)) + BARRIERS;
}

// D: 64 or 128. Without MASKED there is no mask, no causality and a positive scale.
template <class T, int D, bool MASKED>
PATCHGEN_DEVICE void backward_of_head(const AttentionBackward& p, const TensorMap& query_map,
                                      const TensorMap& key_map, const TensorMap& value_map,
                                      const TensorMap& grad_out_map) {
  using Layout = BackwardLayout90;
  constexpr int WARPGROUPS = Layout::warpgroups(D), PARTS = D / PART;
  constexpr int ROWS = WARPGROUP_ROWS, STAGE_BYTES = PARTS * part_bytes(ROWS);
  constexpr int CHUNK_ROWS = Layout::CHUNK_TILES * TILE;
  using Left = LeftTile<T, PARTS, Layout::holds_fragments(D)>;
  using Sums = TileSums<T, PARTS>;
  PATCHGEN_SHARED_MEMORY(memory);

  const int thread = threadIdx.x, warpgroup = WARPGROUPS == 1 ? 0 : thread / WARPGROUP;
  const int warp = thread % WARPGROUP / WARP, lane = thread % WARP;
  const bool leads = thread % WARPGROUP == 0;  // starts its warpgroup's copies
  const int batch = blockIdx.x / p.kv_heads, kv_head = blockIdx.x % p.kv_heads;
  const int group = p.heads / p.kv_heads;
  LogitScale logit(p);
  if (!MASKED) logit.scale_first = false;
  auto view_of = [&](int head) {
    Visibility view(p, whole_extent(p), batch, head);
    if (!MASKED) {  // as it is, but known to the compiler
      view.kind = MaskKind::NONE;
      view.causal = false;
    }
    return view;
  };
  const float to_log2 = logit.unit() * LOG2_E;
  const bool additive =
      MASKED && (p.mask.kind == MaskKind::ELEMENT || p.mask.kind == MaskKind::FLOAT32);
  auto weight_of = [&](float score, float greatest, float shift) {
    if (additive) score -= greatest;
    return exp2_approx(fmaf(score, to_log2, -shift));
  };

  const int query_tiles = ceil_div(p.queries, ROWS), key_tiles = ceil_div(p.keys, ROWS);
  const int padded_queries = round_up(p.queries, TILE), padded_keys = round_up(p.keys, TILE);
  const int longest = max_of(padded_queries, padded_keys), bytes_of_part = part_bytes(longest);
  const uint32_t first = shared_address(memory), second = first + PARTS * bytes_of_part;
  const uint32_t stages = second + PARTS * bytes_of_part;
  const uint32_t stage_a = stages + warpgroup * 2 * STAGE_BYTES, stage_b = stage_a + STAGE_BYTES;
  const uint32_t facts = stages + WARPGROUPS * 2 * STAGE_BYTES;
  const uint32_t barriers =
      facts + group * query_tiles * (ROWS / 2) * static_cast<uint32_t>(sizeof(PairFacts));
  const uint32_t first_here = barriers, second_here = barriers + 8;
  const uint32_t stage_here = barriers + 16 + warpgroup * 8;

  auto pair_of = [&](int member, unsigned pair) -> PairFacts& {
    return shared_at<PairFacts>(facts + (member * query_tiles * (ROWS / 2) + pair) *
                                            static_cast<uint32_t>(sizeof(PairFacts)));
  };
  // Starts copying rows, a multiple of 16, of one head; absent ones become zeros.
  auto fetch = [&](uint32_t to, int part_to_part, const TensorMap& map, uint32_t here, int head,
                   int first_row, int rows) {
    for (int part = 0; part < PARTS; ++part) PATCHGEN_NO_UNROLL
    for (int row = 0; row < rows; row += TILE)
      copy_box_async(to + part * part_to_part + part_bytes(row), map, here, part * PART,
                     first_row + row, head, batch);
  };
  auto fetch_resident = [&](const TensorMap& a, const TensorMap& b, int head, int rows) {
    if (thread != 0) return;
    barrier_expect(first_here, PARTS * part_bytes(rows));
    fetch(first, bytes_of_part, a, first_here, head, 0, rows);
    barrier_expect(second_here, PARTS * part_bytes(rows));
    fetch(second, bytes_of_part, b, second_here, head, 0, rows);
  };
  auto fetch_stage = [&](const TensorMap& a, const TensorMap& b, int head, int first_row) {
    if (!leads) return;
    barrier_expect(stage_here, 2 * STAGE_BYTES);
    fetch(stage_a, part_bytes(ROWS), a, stage_here, head, first_row, ROWS);
    fetch(stage_b, part_bytes(ROWS), b, stage_here, head, first_row, ROWS);
  };
  auto fetch_queries = [&](int work) {
    if (work < group * query_tiles)
      fetch_stage(query_map, grad_out_map, kv_head * group + work / query_tiles,
                  work % query_tiles * ROWS);
  };
  auto fetch_keys = [&](int tile) {
    if (tile < key_tiles) fetch_stage(key_map, value_map, kv_head, tile * ROWS);
  };
  // Calls chunk(Constant<TILES>, row) for rows [0, end), two tiles at a time, and one for the rest.
  auto for_chunks = [&](int end, auto&& chunk) {
    int row = 0;
    PATCHGEN_NO_UNROLL
    for (; row + TILE < end; row += CHUNK_ROWS) chunk(Constant<Layout::CHUNK_TILES>{}, row);
    if (row < end) chunk(Constant<1>{}, row);
  };

  if (thread == 0) {
    for (int i = 0; i < 2 + WARPGROUPS; ++i) barrier_init(barriers + 8 * i, 1);
    barrier_init_fence();
  }
  __syncthreads();

  // ---- rows: keys and values are resident
  fetch_queries(warpgroup);
  fetch_resident(key_map, value_map, kv_head, padded_keys);
  bool resident = false;

  PATCHGEN_NO_UNROLL
  for (int round = 0; round * WARPGROUPS < group * query_tiles; ++round) {
    const int work = round * WARPGROUPS + warpgroup;
    if (work < group * query_tiles) {
      const int member = work / query_tiles, first_query = work % query_tiles * ROWS;
      const int head = kv_head * group + member;
      const int own_query = first_query + warp * TILE;  // of this warp
      const Visibility view = view_of(head);
      const int64_t flat_row =
          (static_cast<int64_t>(batch) * p.heads + head) * p.queries + own_query;
      const T* out = rows_of<T>(p.out, p.out_stride, batch, head) + own_query * p.out_stride.row;
      const int limit = view.limit(min_of(first_query + ROWS, p.queries) - 1);

      barrier_wait(stage_here, round % 2);
      Left queries, grads;
      queries.load(stage_a, warp, lane);
      grads.load(stage_b, warp, lane);

      float delta = 0.f;
      PATCHGEN_UNROLL
      for (int part = 0; part < PARTS; ++part)
        delta += delta_of_row<T, PART>(
            SharedRows<PART>{stage_b + part * part_bytes(ROWS) + part_bytes(warp * TILE)},
            out + part * PART, p.out_stride.row, p.queries - own_query,
            min_of(PART, p.head_dim - part * PART), lane);
      if (lane % 2 == 0) {
        const int row = lane / 2;
        const bool inside = own_query + row < p.queries;
        const float lse = inside ? p.lse[flat_row + row] : MINUS_INFINITY;
        PairFacts& pair = pair_of(member, (own_query + row) / 2u);
        // An empty row, and one of padding, gets the weight 2^-inf.
        pair.shift[row % 2] = lse == MINUS_INFINITY ? INFINITY : lse * LOG2_E;
        pair.greatest[row % 2] = 0.f;
        pair.delta[row % 2] =
            inside ? delta - (p.grad_lse ? p.grad_lse[flat_row + row] : 0.f) : 0.f;
      }
      if (!resident) barrier_wait(first_here, 0);
      if (additive) {  // the saved log-sum-exp may have lost the logarithm of the sum
        RowStatistics exact{{MINUS_INFINITY, MINUS_INFINITY}, {0.f, 0.f}};
        for_chunks(limit, [&](auto tiles, int first_key) {
          constexpr int TILES = decltype(tiles)::value;
          Square logits[TILES];
          wgmma_fence();
          queries.multiply(logits, first + part_bytes(first_key), bytes_of_part);
          wgmma_commit();
          wgmma_wait<0>();
          PATCHGEN_UNROLL
          for (int t = 0; t < TILES; ++t) {
            mask_scores<T, false>(logits[t], view, logit, own_query, first_key + t * TILE, lane);
            add_logits(exact, logits[t]);
          }
        });
        __syncwarp();
        PATCHGEN_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = lane / 4 + 8 * half;
          const float sum = row_sum(exact.sum[half]);
          if (lane % 4 == 0 && sum > 0.f) {
            PairFacts& pair = pair_of(member, (own_query + row) / 2u);
            pair.shift[row % 2] = logf(sum) * LOG2_E;
            pair.greatest[row % 2] = exact.greatest[half];
          }
        }
      }
      __syncwarp();
      float shift[2], deltas[2], greatest[2];
      PATCHGEN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        const PairFacts& pair = pair_of(member, (own_query + row) / 2u);
        shift[half] = pair.shift[row % 2];
        deltas[half] = pair.delta[row % 2];
        greatest[half] = pair.greatest[row % 2];
      }
      if (!resident) barrier_wait(second_here, 0);
      resident = true;

      Sums grad_query;
      grad_query.clear();
      for_chunks(limit, [&](auto tiles, int first_key) {
        constexpr int TILES = decltype(tiles)::value;
        Square scores[TILES], products[TILES];
        wgmma_fence();
        queries.multiply(scores, first + part_bytes(first_key), bytes_of_part);
        wgmma_commit();
        grads.multiply(products, second + part_bytes(first_key), bytes_of_part);
        wgmma_commit();
        wgmma_wait<1>();  // the scores, and what was added last
        PATCHGEN_UNROLL
        for (int t = 0; t < TILES; ++t) {
          mask_scores<T, false>(scores[t], view, logit, own_query, first_key + t * TILE, lane);
          PATCHGEN_UNROLL
          for (int n = 0; n < 2; ++n) PATCHGEN_UNROLL
          for (int i = 0; i < 4; ++i)
            scores[t][n][i] = weight_of(scores[t][n][i], greatest[i / 2], shift[i / 2]);
        }
        wgmma_wait<0>();
        uint32_t d_scores[TILES][4];
        PATCHGEN_UNROLL
        for (int t = 0; t < TILES; ++t) {
          PATCHGEN_UNROLL
          for (int n = 0; n < 2; ++n) PATCHGEN_UNROLL
          for (int i = 0; i < 4; ++i)
            products[t][n][i] = scores[t][n][i] * (products[t][n][i] - deltas[i / 2]);
          to_left_operand<T>(d_scores[t], products[t]);
        }
        wgmma_fence();
        grad_query.add_product(d_scores, first + part_bytes(first_key), bytes_of_part);
        wgmma_commit();
      });
      wgmma_wait<0>();
      grad_query.store(stage_a,
                       rows_of<T>(p.grad_query, p.grad_query_stride, batch, head) +
                           first_query * p.grad_query_stride.row,
                       p.grad_query_stride.row, p.queries - first_query, p.head_dim, p.scale, warp,
                       lane);
    }
    async_proxy_fence();  // the stage goes to a copy again
    __syncthreads();
    fetch_queries(work + WARPGROUPS);
  }

  // ---- columns: queries and grad_out are resident
  const int stages_before = ceil_div(group * query_tiles - warpgroup, WARPGROUPS);
  fetch_keys(warpgroup);

  PATCHGEN_NO_UNROLL
  for (int round = 0; round * WARPGROUPS < key_tiles; ++round) {
    const int tile = round * WARPGROUPS + warpgroup, first_key = tile * ROWS;
    const int own_key = first_key + warp * TILE;
    const bool active = tile < key_tiles;
    Left keys, values;
    Sums grad_key, grad_value;
    grad_key.clear();
    grad_value.clear();
    if (active) {
      barrier_wait(stage_here, (stages_before + round) % 2);
      keys.load(stage_a, warp, lane);
      values.load(stage_b, warp, lane);
    }

    PATCHGEN_NO_UNROLL
    for (int member = 0; member < group; ++member) {
      const int head = kv_head * group + member;
      if (group > 1 || round == 0) {
        if (member > 0) __syncthreads();  // the last head is no longer needed
        fetch_resident(query_map, grad_out_map, head, padded_queries);
        const int parity = (1 + round * group + member) % 2;
        barrier_wait(first_here, parity);
        barrier_wait(second_here, parity);
      }
      if (!active) continue;
      const Visibility view = view_of(head);
      for_chunks(padded_queries, [&](auto tiles, int first_query) {
        constexpr int TILES = decltype(tiles)::value;
        // No query of the chunk sees these keys.
        if (MASKED && first_key >= view.limit(min_of(first_query + TILES * TILE, p.queries) - 1))
          return;
        Square scores[TILES], products[TILES];
        wgmma_fence();
        keys.multiply(scores, first + part_bytes(first_query), bytes_of_part);
        wgmma_commit();
        values.multiply(products, second + part_bytes(first_query), bytes_of_part);
        wgmma_commit();
        wgmma_wait<1>();  // the scores, and what was added last
        uint32_t left[TILES][4];
        PATCHGEN_UNROLL
        for (int t = 0; t < TILES; ++t) {
          if (MASKED)
            mask_scores<T, true>(scores[t], view, logit, first_query + t * TILE, own_key, lane);
          PATCHGEN_UNROLL
          for (int n = 0; n < 2; ++n) {
            const PairFacts& pair = pair_of(member, first_query / 2u + lane % 4 + t * 8 + n * 4);
            PATCHGEN_UNROLL
            for (int i = 0; i < 4; ++i)
              scores[t][n][i] = weight_of(scores[t][n][i], pair.greatest[i % 2], pair.shift[i % 2]);
          }
          to_left_operand<T>(left[t], scores[t]);
        }
        wgmma_fence();
        grad_value.add_product(left, second + part_bytes(first_query), bytes_of_part);
        wgmma_commit();
        wgmma_wait<0>();  // the products; waiting for the sum too saves its operand's registers
        PATCHGEN_UNROLL
        for (int t = 0; t < TILES; ++t) PATCHGEN_UNROLL
        for (int n = 0; n < 2; ++n) {
          const PairFacts& pair = pair_of(member, first_query / 2u + lane % 4 + t * 8 + n * 4);
          PATCHGEN_UNROLL
          for (int i = 0; i < 4; ++i)
            products[t][n][i] = scores[t][n][i] * (products[t][n][i] - pair.delta[i % 2]);
        }
        PATCHGEN_UNROLL
        for (int t = 0; t < TILES; ++t) to_left_operand<T>(left[t], products[t]);
        wgmma_fence();
        grad_key.add_product(left, first + part_bytes(first_query), bytes_of_part);
        wgmma_commit();
      });
      wgmma_wait<0>();
    }
    if (active) {
      const int rows = p.keys - first_key;
      grad_key.store(stage_a,
                     rows_of<T>(p.grad_key, p.grad_key_stride, batch, kv_head) +
                         first_key * p.grad_key_stride.row,
                     p.grad_key_stride.row, rows, p.head_dim, p.scale, warp, lane);
      grad_value.store(stage_b,
                       rows_of<T>(p.grad_value, p.grad_value_stride, batch, kv_head) +
                           first_key * p.grad_value_stride.row,
                       p.grad_value_stride.row, rows, p.head_dim, 1.f, warp, lane);
    }
    async_proxy_fence();  // the stage goes to a copy again
    __syncthreads();
    fetch_keys(tile + WARPGROUPS);
  }
}

// Two kernels, because masks make the code two and a half times as long.
template <class T, int D>
PATCHGEN_KERNEL(BackwardLayout90::threads(D), BackwardLayout90::blocks(D))
attention_backward_sm90_kernel(const AttentionBackward p,
                               const __grid_constant__ TensorMap query_map,
                               const __grid_constant__ TensorMap key_map,
                               const __grid_constant__ TensorMap value_map,
                               const __grid_constant__ TensorMap grad_out_map) {
  // The other architectures of a build get empty kernels: nothing launches them there.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  backward_of_head<T, D, false>(p, query_map, key_map, value_map, grad_out_map);
#endif
}
template <class T, int D>
PATCHGEN_KERNEL(BackwardLayout90::threads(D), BackwardLayout90::blocks(D))
attention_backward_masked_sm90_kernel(const AttentionBackward p,
                                      const __grid_constant__ TensorMap query_map,
                                      const __grid_constant__ TensorMap key_map,
                                      const __grid_constant__ TensorMap value_map,
                                      const __grid_constant__ TensorMap grad_out_map) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  backward_of_head<T, D, true>(p, query_map, key_map, value_map, grad_out_map);
#endif
}

}  // namespace patchgen_fast::cuda
