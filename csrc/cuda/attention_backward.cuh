// Attention over short sequences, backward.
//
//     weights = softmax(scale query key^T + mask), from the saved log-sum-exp
//     d_scores = weights * (grad_out value^T - delta),  delta = rowsum(grad_out * out) - grad_lse
//     grad_query = scale d_scores key,  grad_key = scale d_scores^T query
//     grad_value = weights^T grad_out
//
// One block owns a key-value head with all its query heads, in two passes of one shape:
//   rows:    keys and values resident in shared memory; a warp takes 16 queries and sums grad_query
//   columns: queries and grad_out resident in their place; a warp takes 16 keys and sums grad_key
//            and grad_value
// The scores are computed in both (7 products instead of 5); in return every sum stays in one
// warp's registers, in a fixed order: no atomics, no workspace, no exchange of d_scores, and half
// the shared memory. The second reading of the inputs comes from the L2 cache.
//
// Sums are float32; weights and d_scores are rounded to T before they are multiplied.
#pragma once

#include "softmax.cuh"

namespace patchgen_fast::cuda {

struct BackwardLayout {
  static constexpr int WARPS = 4;
  static constexpr int THREADS = WARPS * WARP;
  static constexpr int BLOCKS = 2;                // a multiprocessor, as registers must allow
  static constexpr int RESIDENT = 2, STAGED = 2;  // matrices; STAGED are of 16 rows a warp

  // Beside two accumulators of 16 x width, registers do not hold wider left operands.
  PATCHGEN_HOST_DEVICE static constexpr bool holds_fragments(int width) { return width <= 80; }
};

// What the columns need to know of a row (a query).
struct alignas(16) RowFacts {
  float greatest;  // subtracted from logits before the change of base
  float shift;     // and this after it: weight = 2^((logit - greatest) log2(e) - shift)
  float delta;
  float unused;  // so that one load of 16 bytes fetches them
};

template <int D>
PATCHGEN_HOST_DEVICE constexpr int backward_shared_bytes(int queries, int keys, int group) {
  using Layout = BackwardLayout;
  int longest = round_up(queries > keys ? queries : keys, TILE);
  int rows = Layout::RESIDENT * longest + Layout::WARPS * Layout::STAGED * TILE;
  return SharedRows<D>::bytes(rows) +
         group * round_up(queries, TILE) * static_cast<int>(sizeof(RowFacts));
}

// delta of a tile of 16 rows, two lanes a row; grad_out is staged, out is read here.
template <class T, int D>
PATCHGEN_DEVICE float delta_of_row(SharedRows<D> grad_out, const T* out, int64_t row_stride,
                                   int rows, int width, int lane) {
  const int row = lane / 2;
  float sum = 0.f;
  if (row < rows)
    for (int chunk = lane % 2; chunk * CHUNK < width; chunk += 2) {
      uint4 a = *reinterpret_cast<const uint4*>(out + row * row_stride + chunk * CHUNK);
      uint4 b = shared_at<uint4>(grad_out.at(row, chunk));
      const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
      PATCHGEN_UNROLL
      for (int i = 0; i < 4; ++i) PATCHGEN_UNROLL
      for (int half = 0; half < 2; ++half)
        sum += unpack<T>(left[i], half) * unpack<T>(right[i], half);
    }
  return sum + shuffle_xor(sum, 1);
}

// Adds 16 columns of logits to the statistics of their rows.
PATCHGEN_DEVICE void add_logits(RowStatistics& row, const Square& logits) {
  PATCHGEN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float *a = logits[0] + 2 * half, *b = logits[1] + 2 * half;
    float greatest = row_max(fmaxf(fmaxf(a[0], a[1]), fmaxf(b[0], b[1])));
    greatest = fmaxf(greatest, row.greatest[half]);
    if (greatest == MINUS_INFINITY) continue;  // the same for the four lanes of the row
    const float sum = expf(a[0] - greatest) + expf(a[1] - greatest) + expf(b[0] - greatest) +
                      expf(b[1] - greatest);
    row.sum[half] = row.sum[half] * expf(row.greatest[half] - greatest) + sum;
    row.greatest[half] = greatest;
  }
}

// Statistics of 16 rows of logits, tile by tile. Only for additive masks: beside a logit of
// finfo.min the saved log-sum-exp has lost the logarithm of the sum.
template <class T, class Left, int D>
PATCHGEN_DEVICE RowStatistics recompute_statistics(const Left& queries, SharedRows<D> keys,
                                                   const Visibility& view, const LogitScale& logit,
                                                   int first_query, int key_tiles, int lane) {
  RowStatistics row;
  PATCHGEN_UNROLL
  for (int half = 0; half < 2; ++half) {
    row.greatest[half] = MINUS_INFINITY;
    row.sum[half] = 0.f;
  }
  PATCHGEN_NO_UNROLL
  for (int t = 0; t < key_tiles; ++t) {
    Square logits;
    multiply_rows(logits, queries, keys, t * TILE, lane);
    mask_scores<T, false>(logits, view, logit, first_query, t * TILE, lane);
    add_logits(row, logits);
  }
  PATCHGEN_UNROLL
  for (int half = 0; half < 2; ++half) row.sum[half] = row_sum(row.sum[half]);
  return row;
}

// The facts of element i of part n of a square: of its row, or, TRANSPOSED, of its column.
// `facts` is the address of those of the square's first row (column).
template <bool TRANSPOSED>
PATCHGEN_DEVICE RowFacts facts_of(uint32_t facts, int n, int i, int lane) {
  int row = lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
  return shared_at<RowFacts>(facts +
                             (TRANSPOSED ? column : row) * static_cast<uint32_t>(sizeof(RowFacts)));
}

// weights = softmax(scores)
template <bool TRANSPOSED>
PATCHGEN_DEVICE void to_weights(Square& scores, uint32_t facts, const LogitScale& logit, int lane) {
  const float to_log2 = logit.unit() * LOG2_E;
  PATCHGEN_UNROLL
  for (int n = 0; n < 2; ++n) PATCHGEN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const RowFacts row = facts_of<TRANSPOSED>(facts, n, i, lane);
    float score = scores[n][i];
    if (logit.scale_first) score -= row.greatest;
    scores[n][i] = exp2_approx(fmaf(score, to_log2, -row.shift));
  }
}

// d_scores = weights * (products - delta), where products are those of grad_out and values
template <bool TRANSPOSED>
PATCHGEN_DEVICE void to_d_scores(Square& products, const Square& weights, uint32_t facts,
                                 int lane) {
  PATCHGEN_UNROLL
  for (int n = 0; n < 2; ++n) PATCHGEN_UNROLL
  for (int i = 0; i < 4; ++i)
    products[n][i] =
        weights[n][i] * (products[n][i] - facts_of<TRANSPOSED>(facts, n, i, lane).delta);
}

// Zeros in all gradients of a key-value head and its query heads.
template <class T>
PATCHGEN_DEVICE void clear_head(const AttentionBackward& p, const Extent& extent, int batch,
                                int kv_head, int thread) {
  const int group = p.heads / p.kv_heads;
  auto clear = [&](void* grad, const Strides& stride, int head, int first_row, int rows) {
    clear_rows(rows_of<T>(grad, stride, batch, head, first_row), stride.row, rows, p.head_dim,
               thread, BackwardLayout::THREADS);
  };
  for (int member = 0; member < group; ++member)
    clear(p.grad_query, p.grad_query_stride, kv_head * group + member, extent.first_query,
          extent.queries);
  clear(p.grad_key, p.grad_key_stride, kv_head, extent.first_key, extent.keys);
  clear(p.grad_value, p.grad_value_stride, kv_head, extent.first_key, extent.keys);
}

// D: head_dim rounded up to a width we have.
template <class T, int D>
PATCHGEN_KERNEL(BackwardLayout::THREADS, BackwardLayout::BLOCKS)
attention_backward_kernel(const AttentionBackward p) {
  constexpr int WARPS = BackwardLayout::WARPS, THREADS = BackwardLayout::THREADS;
  using Rows = SharedRows<D>;
  using Left = LeftFragments<T, D, BackwardLayout::holds_fragments(D)>;
  PATCHGEN_SHARED_MEMORY(memory);

  const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
  const int batch = blockIdx.x / p.kv_heads, kv_head = blockIdx.x % p.kv_heads;
  const int group = p.heads / p.kv_heads;
  const Extent extent = extent_of(p, batch);
  if (is_unowned(p, batch)) {
    clear_head<T>(p, extent, batch, kv_head, thread);
    return;
  }
  const LogitScale logit(p);
  const bool additive = p.mask.kind == MaskKind::ELEMENT || p.mask.kind == MaskKind::FLOAT32;

  const int query_tiles = ceil_div(extent.queries, TILE), padded_queries = query_tiles * TILE;
  const int longest = max_of(padded_queries, round_up(extent.keys, TILE));
  const uint32_t shared = shared_address(memory);
  const Rows first{shared}, second{shared + Rows::bytes(longest)};  // the resident pair
  const uint32_t own = shared + Rows::bytes(2 * longest + warp * 2 * TILE);
  const Rows stage_a{own}, stage_b{own + Rows::bytes(TILE)};
  const uint32_t facts = shared + Rows::bytes(2 * longest + WARPS * 2 * TILE);

  auto facts_at = [&](int member, int row) {
    return facts + (member * padded_queries + row) * static_cast<uint32_t>(sizeof(RowFacts));
  };
  // 16 rows of two matrices, as left operands.
  auto stage_pair = [&](const T* a, int64_t a_stride, const T* b, int64_t b_stride, int row,
                        int rows, Left& left_a, Left& left_b) {
    __syncwarp();  // the stage is read out
    copy_rows_async<T, D>(stage_a, a + row * a_stride, a_stride, rows - row, TILE, p.head_dim, lane,
                          WARP);
    copy_rows_async<T, D>(stage_b, b + row * b_stride, b_stride, rows - row, TILE, p.head_dim, lane,
                          WARP);
    copy_async_commit();
    copy_async_wait<0>();
    __syncwarp();
    left_a.load(stage_a, 0, lane);
    left_b.load(stage_b, 0, lane);
  };

  // ---- rows: keys and values are resident
  const int kv_length = Visibility(p, extent, batch, 0).keys;
  copy_rows_async<T, D>(first, rows_of<T>(p.key, p.key_stride, batch, kv_head, extent.first_key),
                        p.key_stride.row, kv_length, round_up(kv_length, TILE), p.head_dim, thread,
                        THREADS);
  copy_rows_async<T, D>(
      second, rows_of<T>(p.value, p.value_stride, batch, kv_head, extent.first_key),
      p.value_stride.row, kv_length, round_up(kv_length, TILE), p.head_dim, thread, THREADS);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();

  PATCHGEN_NO_UNROLL
  for (int work = warp; work < group * query_tiles; work += WARPS) {
    const int member = work / query_tiles, first_query = work % query_tiles * TILE;
    const int head = kv_head * group + member;
    const int rows = min_of(TILE, extent.queries - first_query);
    const Visibility view(p, extent, batch, head);
    const uint32_t tile_facts = facts_at(member, first_query);
    const int64_t flat_row = lse_row(p, extent, batch, head) + first_query;
    const T* out = rows_of<T>(p.out, p.out_stride, batch, head, extent.first_query) +
                   first_query * p.out_stride.row;

    Left queries, grads;
    stage_pair(rows_of<T>(p.query, p.query_stride, batch, head, extent.first_query),
               p.query_stride.row,
               rows_of<T>(p.grad_out, p.grad_out_stride, batch, head, extent.first_query),
               p.grad_out_stride.row, first_query, extent.queries, queries, grads);
    const int key_tiles = ceil_div(view.tile_limit(first_query), TILE);

    const float delta = delta_of_row<T, D>(stage_b, out, p.out_stride.row, rows, p.head_dim, lane);
    if (lane % 2 == 0) {
      const int row = lane / 2;
      const bool inside = row < rows;
      const float lse = inside ? p.lse[flat_row + row] : MINUS_INFINITY;
      RowFacts own_facts{};
      // An empty row, and one of padding, gets the weight 2^-inf.
      if (lse == MINUS_INFINITY)
        own_facts.shift = INFINITY;
      else if (logit.scale_first)
        own_facts.greatest = lse;
      else
        own_facts.shift = lse * LOG2_E;
      if (inside) own_facts.delta = delta - (p.grad_lse ? p.grad_lse[flat_row + row] : 0.f);
      shared_at<RowFacts>(facts_at(member, first_query + row)) = own_facts;
    }
    __syncwarp();
    if (additive) {
      RowStatistics exact =
          recompute_statistics<T>(queries, first, view, logit, first_query, key_tiles, lane);
      PATCHGEN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        if (lane % 4 == 0 && row < rows && exact.sum[half] > 0.f) {
          RowFacts& own_facts = shared_at<RowFacts>(facts_at(member, first_query + row));
          own_facts.greatest = exact.greatest[half];
          own_facts.shift = logf(exact.sum[half]) * LOG2_E;
        }
      }
      __syncwarp();
    }

    RowAccumulators<D> grad_query;
    grad_query.clear();
    PATCHGEN_NO_UNROLL
    for (int t = 0; t < key_tiles; ++t) {
      Square scores, products;
      multiply_rows(scores, queries, first, t * TILE, lane);
      mask_scores<T, false>(scores, view, logit, first_query, t * TILE, lane);
      to_weights<false>(scores, tile_facts, logit, lane);
      multiply_rows(products, grads, second, t * TILE, lane);
      to_d_scores<false>(products, scores, tile_facts, lane);
      uint32_t d_scores[4];
      to_left_operand<T>(d_scores, products);
      grad_query.template add_product<T>(d_scores, first, t * TILE, lane);
    }
    grad_query.scale_rows(p.scale, p.scale);
    __syncwarp();  // delta has been read from the stage
    T* to = rows_of<T>(p.grad_query, p.grad_query_stride, batch, head, extent.first_query) +
            first_query * p.grad_query_stride.row;
    grad_query.template store<T>(stage_a, to, p.grad_query_stride.row, rows, p.head_dim, lane);
  }

  // ---- columns: queries and grad_out are resident
  const int key_tiles = ceil_div(extent.keys, TILE);
  PATCHGEN_NO_UNROLL
  for (int block_tile = 0; block_tile < key_tiles; block_tile += WARPS) {
    const int first_key = (block_tile + warp) * TILE;
    const bool active = first_key < extent.keys;
    Left keys, values;
    RowAccumulators<D> grad_key, grad_value;
    grad_key.clear();
    grad_value.clear();
    if (active)  // keys from kv_length on are zeros here: they are hidden, and may hold anything
      stage_pair(rows_of<T>(p.key, p.key_stride, batch, kv_head, extent.first_key),
                 p.key_stride.row,
                 rows_of<T>(p.value, p.value_stride, batch, kv_head, extent.first_key),
                 p.value_stride.row, first_key, kv_length, keys, values);

    PATCHGEN_NO_UNROLL
    for (int member = 0; member < group; ++member) {
      const int head = kv_head * group + member;
      if (group > 1 || block_tile == 0) {
        __syncthreads();  // what was resident is no longer needed, and the facts are written
        copy_rows_async<T, D>(
            first, rows_of<T>(p.query, p.query_stride, batch, head, extent.first_query),
            p.query_stride.row, extent.queries, padded_queries, p.head_dim, thread, THREADS);
        copy_rows_async<T, D>(
            second, rows_of<T>(p.grad_out, p.grad_out_stride, batch, head, extent.first_query),
            p.grad_out_stride.row, extent.queries, padded_queries, p.head_dim, thread, THREADS);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
      }
      if (!active) continue;
      const Visibility view(p, extent, batch, head);
      PATCHGEN_NO_UNROLL
      for (int t = 0; t < query_tiles; ++t) {
        if (first_key >= view.tile_limit(t * TILE)) continue;  // no query of the tile sees them
        Square scores, products;
        multiply_rows(scores, keys, first, t * TILE, lane);
        mask_scores<T, true>(scores, view, logit, t * TILE, first_key, lane);
        to_weights<true>(scores, facts_at(member, t * TILE), logit, lane);
        uint32_t left[4];
        to_left_operand<T>(left, scores);
        grad_value.template add_product<T>(left, second, t * TILE, lane);
        multiply_rows(products, values, second, t * TILE, lane);
        to_d_scores<true>(products, scores, facts_at(member, t * TILE), lane);
        to_left_operand<T>(left, products);
        grad_key.template add_product<T>(left, first, t * TILE, lane);
      }
    }
    if (!active) continue;
    grad_key.scale_rows(p.scale, p.scale);
    const int rows = extent.keys - first_key;
    T* to_key = rows_of<T>(p.grad_key, p.grad_key_stride, batch, kv_head, extent.first_key) +
                first_key * p.grad_key_stride.row;
    T* to_value = rows_of<T>(p.grad_value, p.grad_value_stride, batch, kv_head, extent.first_key) +
                  first_key * p.grad_value_stride.row;
    __syncwarp();
    grad_key.template store<T>(stage_a, to_key, p.grad_key_stride.row, rows, p.head_dim, lane);
    grad_value.template store<T>(stage_b, to_value, p.grad_value_stride.row, rows, p.head_dim,
                                 lane);
  }
}

}  // namespace patchgen_fast::cuda
