// Which instance of the attention kernels serves a problem, and with how many blocks.
#pragma once

#include <algorithm>

#include "attention_backward.cuh"
#include "attention_backward_sm90.cuh"
#include "attention_decode.cuh"
#include "attention_forward.cuh"
#include "attention_forward_sm90.cuh"
#include "plan.h"

namespace patchgen_fast::cuda {

// Calls use(Constant<TILES>) with the least bound we have on tiles of 16 keys. Within it a kernel
// skips the products of absent tiles; the bound decides registers, so there are few.
template <class Use>
void with_key_tiles([[maybe_unused]] int keys, Use&& use) {
#if !defined(PATCHGEN_FEWER_INSTANCES)
  const int tiles = ceil_div(keys, TILE);
  if (tiles <= 4) return use(Constant<4>{});
  if (tiles <= 8) return use(Constant<8>{});
  if (tiles <= 13) return use(Constant<13>{});
#endif
  return use(Constant<17>{});
}

// Calls run(instance, launch, kernel, arguments...).
template <class T, class Run>
void plan_attention_forward(const AttentionForward& p, int multiprocessors, Run&& run) {
  const int64_t heads = static_cast<int64_t>(p.batch) * p.heads;
  const int query_tiles = ceil_div(p.queries, TILE);
  if (heads == 0 || query_tiles == 0) return;
  // One block a head, unless that leaves multiprocessors without two blocks to overlap.
  const int most = ceil_div(query_tiles, ForwardLayout::WARPS);
  const int wanted = static_cast<int>((2 * multiprocessors + heads - 1) / heads);
  const int shares = std::clamp(wanted, 1, most);
  with_width(p.head_dim, [&](auto width) {
    with_key_tiles(p.keys, [&](auto tiles) {
      run(Instance{"attention_forward", p.dtype, width, tiles},
          Launch{heads * shares, ForwardLayout::THREADS, forward_shared_bytes<width>(p.keys)},
          Kernel<attention_forward_kernel<T, width, tiles>>{}, p, shares);
    });
  });
}

// Whether TMA can walk so many of these: it is not known to take strides of 0.
inline bool has_strides(const AttentionInputs& p, const Strides& stride, int heads, int rows) {
  return (stride.batch > 0 || p.batch == 1) && (stride.head > 0 || heads == 1) &&
         (stride.row > 0 || rows == 1);
}

// What the wgmma kernels serve: head dimensions that their two widths hold without padding much,
// and whole sequences (values beyond a length would have to be zeroed after the copy).
inline bool served_by_sm90(const AttentionInputs& p) {
  const bool width = (p.head_dim > 48 && p.head_dim <= 64) || (p.head_dim > 96);
  return width && !p.kv_lengths && !p.packed.query_starts && p.keys > 0 &&
         p.keys <= SHORT_SEQUENCE && has_strides(p, p.query_stride, p.heads, p.queries) &&
         has_strides(p, p.key_stride, p.kv_heads, p.keys) &&
         has_strides(p, p.value_stride, p.kv_heads, p.keys);
}

inline TensorMap map_of(const AttentionInputs& p, const void* data, const Strides& stride,
                        int heads, int rows, int box_rows) {
  return make_tensor_map(data, {p.batch, heads, rows, p.head_dim},
                         {stride.batch, stride.head, stride.row}, box_rows,
                         ForwardLayout90::COLUMNS);
}

// For a GPU of sm_90. A block takes 64 queries at a time.
template <class T, class Run>
void plan_attention_forward_sm90(const AttentionForward& p, int multiprocessors, Run&& run) {
  const int64_t heads = static_cast<int64_t>(p.batch) * p.heads;
  const int query_tiles = ceil_div(p.queries, ForwardLayout90::QUERIES);
  if (heads == 0 || query_tiles == 0) return;
  const int wanted = static_cast<int>((2 * multiprocessors + heads - 1) / heads);
  const int shares = std::clamp(wanted, 1, query_tiles);
  auto launch = [&](auto width, auto tiles) {
    const int box = tiles * TILE / ForwardLayout90::boxes(tiles);
    run(Instance{"attention_forward_sm90", p.dtype, width, tiles},
        Launch{heads * shares, ForwardLayout90::THREADS, forward_shared_bytes_sm90<width, tiles>()},
        Kernel<attention_forward_sm90_kernel<T, width, tiles>>{}, p,
        map_of(p, p.query, p.query_stride, p.heads, p.queries, ForwardLayout90::QUERIES),
        map_of(p, p.key, p.key_stride, p.kv_heads, p.keys, box),
        map_of(p, p.value, p.value_stride, p.kv_heads, p.keys, box), shares);
  };
  with_key_tiles(p.keys, [&](auto tiles) {
    if (p.head_dim <= 64) return launch(Constant<64>{}, tiles);
    launch(Constant<128>{}, tiles);
  });
}

template <class T, class Run>
void plan_attention_backward(const AttentionBackward& p, Run&& run) {
  const int64_t kv_heads = static_cast<int64_t>(p.batch) * p.kv_heads;
  if (kv_heads == 0 || (p.queries == 0 && p.keys == 0)) return;
  with_width(p.head_dim, [&](auto width) {
    run(Instance{"attention_backward", p.dtype, width},
        Launch{kv_heads, BackwardLayout::THREADS,
               backward_shared_bytes<width>(p.queries, p.keys, p.heads / p.kv_heads)},
        Kernel<attention_backward_kernel<T, width>>{}, p);
  });
}

// As served_by_sm90, and a head with all that shares its keys fits in the shared memory.
inline bool backward_served_by_sm90(const AttentionBackward& p) {
  constexpr int SHARED_BYTES = 227 * 1024;  // the most a block of sm_90 can have
  if (!served_by_sm90(p) || p.queries == 0 || p.queries > SHORT_SEQUENCE ||
      !has_strides(p, p.grad_out_stride, p.heads, p.queries))
    return false;
  const int group = p.heads / p.kv_heads;
  return (p.head_dim <= 64
              ? backward_shared_bytes_sm90<64>(p.queries, p.keys, group)
              : backward_shared_bytes_sm90<128>(p.queries, p.keys, group)) <= SHARED_BYTES;
}

// For a GPU of sm_90.
template <class T, class Run>
void plan_attention_backward_sm90(const AttentionBackward& p, Run&& run) {
  const int64_t kv_heads = static_cast<int64_t>(p.batch) * p.kv_heads;
  if (kv_heads == 0) return;
  auto map = [&](const void* data, const Strides& stride, int heads, int rows) {
    return map_of(p, data, stride, heads, rows, TILE);
  };
  auto launch = [&](const char* name, auto width, auto kernel) {
    run(Instance{name, p.dtype, width},
        Launch{kv_heads, BackwardLayout90::threads(width),
               backward_shared_bytes_sm90<width>(p.queries, p.keys, p.heads / p.kv_heads)},
        kernel, p, map(p.query, p.query_stride, p.heads, p.queries),
        map(p.key, p.key_stride, p.kv_heads, p.keys),
        map(p.value, p.value_stride, p.kv_heads, p.keys),
        map(p.grad_out, p.grad_out_stride, p.heads, p.queries));
  };
  const bool masked = p.mask.kind != MaskKind::NONE || p.causal || !(p.scale > 0.f);
  auto of_width = [&](auto width) {
    if (masked)
      return launch("attention_backward_masked_sm90", width,
                    Kernel<attention_backward_masked_sm90_kernel<T, width>>{});
    launch("attention_backward_sm90", width, Kernel<attention_backward_sm90_kernel<T, width>>{});
  };
  if (p.head_dim <= 64) return of_width(Constant<64>{});
  of_width(Constant<128>{});
}

// Enough splits for four blocks a multiprocessor, none shorter than 128 keys.
inline DecodeSize decode_size(const AttentionInputs& p, int multiprocessors) {
  const int64_t row_tiles =
      static_cast<int64_t>(p.batch) * p.kv_heads * ceil_div(p.heads / p.kv_heads * p.queries, TILE);
  if (row_tiles == 0) return {1, 0, 0};
  const int64_t wanted = (4 * multiprocessors + row_tiles - 1) / row_tiles;
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max(1, p.keys / 128));
  if (splits == 1) return {1, 0, 0};
  int64_t floats = 0;
  with_width(p.head_dim, [&](auto width) { floats = row_tiles * splits * TILE * (width + 2); });
  return {static_cast<int>(splits), floats, row_tiles};
}

template <class T, class Run>
void plan_attention_decode(const AttentionForward& p, const DecodeWork& work, Run&& run) {
  const int64_t row_tiles =
      static_cast<int64_t>(p.batch) * p.kv_heads * ceil_div(p.heads / p.kv_heads * p.queries, TILE);
  if (row_tiles == 0) return;
  with_width(p.head_dim, [&](auto width) {
    run(Instance{"attention_decode", p.dtype, width},
        Launch{row_tiles * work.splits, DecodeLayout::THREADS, decode_shared_bytes<width>()},
        Kernel<attention_decode_kernel<T, width>>{}, p, work);
  });
}

// Every instance of the forward kernel, at the largest size that it serves.
template <class T, class Run>
void plan_every_forward(DType dtype, Run&& run) {
  for (int head_dim : {32, 64, 72, 80, 96, 128})
    for (int tokens : {64, 128, 208, SHORT_SEQUENCE}) {
      AttentionForward p{};
      p.batch = p.heads = p.kv_heads = 1;
      p.queries = p.keys = tokens;
      p.head_dim = head_dim;
      p.dtype = dtype;
      plan_attention_forward<T>(p, 1, run);
    }
}

template <class T, class Run>
void plan_every_forward_sm90(DType dtype, Run&& run) {
  alignas(16) static const char nothing[16] = {};  // a tensor map must point somewhere
  for (int head_dim : {64, 128})
    for (int tokens : {64, 128, 208, SHORT_SEQUENCE}) {
      AttentionForward p{};
      p.query = p.key = p.value = nothing;
      p.query_stride = p.key_stride =
          p.value_stride = {int64_t{tokens} * head_dim, int64_t{tokens} * head_dim, head_dim};
      p.batch = p.heads = p.kv_heads = 1;
      p.queries = p.keys = tokens;
      p.head_dim = head_dim;
      p.dtype = dtype;
      plan_attention_forward_sm90<T>(p, 1, run);
    }
}

template <class T, class Run>
void plan_every_backward_sm90(DType dtype, Run&& run) {
  alignas(16) static const char nothing[16] = {};
  for (int head_dim : {64, 128})
    for (bool causal : {false, true}) {
      AttentionBackward p{};
      p.query = p.key = p.value = p.grad_out = nothing;
      p.query_stride = p.key_stride = p.value_stride = p.grad_out_stride = {
          int64_t{SHORT_SEQUENCE} * head_dim, int64_t{SHORT_SEQUENCE} * head_dim, head_dim};
      p.batch = p.heads = p.kv_heads = 1;
      p.queries = p.keys = SHORT_SEQUENCE;
      p.head_dim = head_dim;
      p.dtype = dtype;
      p.causal = causal;
      p.scale = 1.f;
      plan_attention_backward_sm90<T>(p, run);
    }
}

// Every instance of the kernels for gradients and for generation, at the longest sequence.
template <class T, class Run>
void plan_every_backward_and_decode(DType dtype, Run&& run) {
  for (int head_dim : {32, 64, 72, 80, 96, 128}) {
    AttentionBackward p{};
    p.batch = p.heads = p.kv_heads = 1;
    p.queries = p.keys = SHORT_SEQUENCE;
    p.head_dim = head_dim;
    p.dtype = dtype;
    plan_attention_backward<T>(p, run);
    AttentionForward step{};
    static_cast<AttentionInputs&>(step) = p;
    step.queries = 1;
    plan_attention_decode<T>(step, {nullptr, nullptr, 1}, run);
  }
}

}  // namespace patchgen_fast::cuda
