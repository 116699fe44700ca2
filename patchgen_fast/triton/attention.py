"""Attention forward.

    out[i] = sum_j P[i, j] value[j],  P = softmax over the keys j seen by i of scale * q k^T + mask
    lse[i] = log sum_j exp(scale * q k^T + mask)

Two kernels, both without a score matrix in memory:

* `_attention_short_fwd_kernel`, to 256 keys that all rows see: one program owns a (batch, head) or,
  when there are too few heads to fill the chip, an interleaved share of its query tiles. Keys and
  values are read once and stay on chip; each query tile sees all its scores at once, so the softmax
  is a single pass without rescaling. Keys are cut into chunks of 128 + 64 + 16 and the like instead
  of being padded to 256.
* `_attention_fwd_kernel`, any length: one program owns one query tile of one head and streams the
  keys with an online softmax. Blocks that every row sees in full run without a comparison; the
  diagonal and the tail come after them in a loop of their own. Packed sequences run here too
  (varlen_attention.py); a few queries against many keys have attention_decode.py.

Bytes moved: each of query, key, value and out once (short) or key and value once a query tile
(streaming, mostly out of L2), and four a row for the log-sum-exp. Sums are float32.

Tiles are loaded through pointers on every chip. Tensor descriptors (TMA) would have to be encoded
on the host at every call, within its 25 microseconds, and D = 72 takes two of them: whether they
gain is for a GPU to say first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import attention_decode as decoding
from .attention_configs import SHORT, STREAM
from .attention_parts import (
    MASK_STRIDES,
    SIZES,
    causal_offset,
    covered,
    exponentials,
    finite_maximum,
    head_offset,
    inverse_and_lse,
    make_spec,
    mask_scores,
    online_softmax_update,
    positive_scale,
    score_unit,
    sequence,
    visible_keys,
)
from .configs import kind_of
from .launch import capability, empty, launch, multiprocessors
from .replay import replayed
from .tiles import add_dot, chunks, dot_rows, load_tile, scale_tile, store_tile, wide, zeros_tile

SHORT_KEYS = 256  # the most that two chunks of 128 hold

_STRIDES = [f"stride_{t}{d}" for t in "qkvo" for d in "bhn"]
_NOT_SPECIALISED = [*_STRIDES, *MASK_STRIDES, "stride_lb", "stride_lh", *SIZES]


@triton.jit
def _key_chunks(base, stride, nk, SPEC: tl.constexpr, KEY_CHUNKS: tl.constexpr):
    """All keys (or values) of a head, a tile a chunk. Only the last can be short."""
    tiles = ()
    for i in tl.static_range(len(KEY_CHUNKS)):
        key = KEY_CHUNKS[i][0] + tl.arange(0, KEY_CHUNKS[i][1])
        tile = load_tile(
            base, key * stride, key < nk, SPEC.d, SPEC.chunks, i == len(KEY_CHUNKS) - 1
        )
        tiles = tiles + (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit(do_not_specialize=[*_STRIDES, *SIZES, "shares"])
def _attention_short_fwd_kernel(
    query, key, value, out, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    heads, group, nq, nk, shares, scale,
    SPEC: tl.constexpr, KEY_CHUNKS: tl.constexpr, ONE_PASS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0) % shares
    head_id = tl.program_id(0) // shares
    batch, head = head_id // heads, head_id % heads
    query += head_offset(batch, head, stride_qb, stride_qh, SPEC.vec)
    key += head_offset(batch, head // group, stride_kb, stride_kh, SPEC.vec)
    value += head_offset(batch, head // group, stride_vb, stride_vh, SPEC.vec)
    out += head_offset(batch, head, stride_ob, stride_oh, SPEC.vec)
    lse += wide(head_id) * nq
    unit = score_unit(scale, SPEC)

    keys = _key_chunks(key, stride_kn * SPEC.vec, nk, SPEC, KEY_CHUNKS)
    values = _key_chunks(value, stride_vn * SPEC.vec, nk, SPEC, KEY_CHUNKS)
    lane = tl.arange(0, BLOCK_M)
    for first_row in tl.range(share * BLOCK_M, nq, shares * BLOCK_M):
        keep = first_row + lane < nq
        rows = query + wide(first_row) * (stride_qn * SPEC.vec)
        q = load_tile(rows, lane * (stride_qn * SPEC.vec), keep, SPEC.d, SPEC.chunks, True)
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        tile = zeros_tile(BLOCK_M, SPEC.chunks)
        scores = ()
        for i in tl.static_range(len(KEY_CHUNKS)):
            part = dot_rows(q, keys[i], SPEC.precision)
            if i == len(KEY_CHUNKS) - 1:
                there = KEY_CHUNKS[i][0] + tl.arange(0, KEY_CHUNKS[i][1]) < nk
                part = tl.where(there[None, :], part, float("-inf"))
            if ONE_PASS:
                maximum = tl.maximum(maximum, tl.max(part, 1))
                scores = scores + (part,)  # type: ignore[assignment]
            else:
                maximum, total, tile = online_softmax_update(
                    part, values[i], maximum, total, tile, unit, SPEC
                )
        for i in tl.static_range(len(scores)):
            weights = exponentials(scores[i], maximum, unit, SPEC)
            total += tl.sum(weights, 1)
            tile = add_dot(tile, weights.to(value.dtype.element_ty), values[i], SPEC.precision)
        inverse, row_lse = inverse_and_lse(maximum, total, unit, SPEC)
        rows = out + wide(first_row) * (stride_on * SPEC.vec)
        tile = scale_tile(tile, inverse)
        store_tile(rows, lane * (stride_on * SPEC.vec), keep, tile, SPEC.d, SPEC.chunks)
        tl.store(lse + first_row + lane, row_lse, mask=keep)


@triton.jit
def _attend_blocks(
    state, q, key, value, mask, stride_kn, stride_vn, stride_mq, stride_mk,
    first_row, begin, end, nq, offset, scale, unit,
    SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHECK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Streams the keys from `begin` to `end` past a query tile; CHECK where one can be short."""
    maximum, total, tile = state
    lane = tl.arange(0, BLOCK_N)
    for first_key in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        keep = first_key + lane < end
        k = load_tile(
            key + wide(first_key) * stride_kn, lane * stride_kn, keep, SPEC.d, SPEC.chunks, CHECK
        )
        scores = mask_scores(
            dot_rows(q, k, SPEC.precision), mask, stride_mq, stride_mk, first_row, first_key,
            tl.arange(0, BLOCK_M)[:, None], lane[None, :], nq, end, offset, scale, SPEC, CHECK,
            SPEC.causal and CHECK,
        )  # fmt: skip
        v = load_tile(
            value + wide(first_key) * stride_vn, lane * stride_vn, keep, SPEC.d, SPEC.chunks, CHECK
        )
        maximum, total, tile = online_softmax_update(scores, v, maximum, total, tile, unit, SPEC)
    return maximum, total, tile


@triton.jit(do_not_specialize=[*_NOT_SPECIALISED, "tiles"])
def _attention_fwd_kernel(
    query, key, value, out, lse, mask, kv_lengths, query_offset, offsets_q, offsets_k,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_lb, stride_lh,
    heads, group, nq, nk, tiles, scale,
    SPEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile_id = tl.program_id(0) % tiles
    head_id = tl.program_id(0) // tiles
    if SPEC.causal:
        tile_id = tiles - 1 - tile_id  # the longest rows first, so that none of them ends last
    batch, head = head_id // heads, head_id % heads
    query += head_offset(batch, head, stride_qb, stride_qh, SPEC.vec)
    key += head_offset(batch, head // group, stride_kb, stride_kh, SPEC.vec)
    value += head_offset(batch, head // group, stride_vb, stride_vh, SPEC.vec)
    out += head_offset(batch, head, stride_ob, stride_oh, SPEC.vec)
    lse += head_offset(batch, head, stride_lb, stride_lh, 1)
    if SPEC.mask_kind != 0:
        mask += head_offset(batch, head, stride_mb, stride_mh, SPEC.mask_vec)
    stride_qn *= SPEC.vec
    stride_kn *= SPEC.vec
    stride_vn *= SPEC.vec
    stride_on *= SPEC.vec
    offset = causal_offset(batch, query_offset)
    if offsets_q is not None:
        start_q, nq = sequence(offsets_q, batch, nq)
        start_k, nk = sequence(offsets_k, batch, nk)
        query += start_q * stride_qn
        out += start_q * stride_on
        lse += start_q
        key += start_k * stride_kn
        value += start_k * stride_vn
        offset = nk - nq
    keys_end = visible_keys(batch, nk, kv_lengths)
    unit = score_unit(scale, SPEC)

    first_row = tile_id * BLOCK_M
    if first_row < nq:
        lane = tl.arange(0, BLOCK_M)
        keep = first_row + lane < nq
        query += wide(first_row) * stride_qn
        q = load_tile(query, lane * stride_qn, keep, SPEC.d, SPEC.chunks, True)
        full = keys_end
        if SPEC.causal:
            keys_end = tl.minimum(keys_end, tl.maximum(first_row + BLOCK_M + offset, 0))
            full = tl.minimum(full, tl.maximum(first_row + offset + 1, 0))
        full = full // BLOCK_N * BLOCK_N
        state = (
            tl.full([BLOCK_M], float("-inf"), tl.float32),
            tl.zeros([BLOCK_M], tl.float32),
            zeros_tile(BLOCK_M, SPEC.chunks),
        )
        state = _attend_blocks(
            state, q, key, value, mask, stride_kn, stride_vn, stride_mq, stride_mk, first_row, 0,
            full, nq, offset, scale, unit, SPEC, BLOCK_M, BLOCK_N, False, STAGES,
        )  # fmt: skip
        maximum, total, tile = _attend_blocks(
            state, q, key, value, mask, stride_kn, stride_vn, stride_mq, stride_mk, first_row, full,
            keys_end, nq, offset, scale, unit, SPEC, BLOCK_M, BLOCK_N, True, 1,
        )  # fmt: skip
        maximum = finite_maximum(maximum, SPEC.may_be_empty)
        inverse, row_lse = inverse_and_lse(maximum, total, unit, SPEC)
        out += wide(first_row) * stride_on
        store_tile(out, lane * stride_on, keep, scale_tile(tile, inverse), SPEC.d, SPEC.chunks)
        tl.store(lse + first_row + lane, row_lse, mask=keep)


@replayed
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    query_offset: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention forward; arguments and results as in the op's schema.

    query [B, H, Nq, D], key and value [B, Hkv, Nk, D] -> out [B, H, Nq, D], which lies in memory as
    [B, Nq, H, D], and lse float32 [B, H, Nq].
    """
    batches, heads, nq, d = query.shape
    kv_heads, nk = key.shape[1], key.shape[2]
    out = empty(query, batches, nq, heads, d).transpose(1, 2)
    lse = empty(query, batches, heads, nq, dtype=torch.float32)
    if out.numel() == 0 or nk == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    query, scale = positive_scale(query, scale)
    spec, strides, mask_strides = make_spec(
        (query, key, value, out),
        attn_mask,
        is_causal,
        kv_lengths is not None or query_offset is not None,
    )
    kind, chip = kind_of(query.dtype, spec.precision), capability(query)
    size_d, group = covered(d), heads // kv_heads
    if decoding.fits(nq, group, nk):
        decoding.decode(
            query, key, value, out, lse, attn_mask, kv_lengths, query_offset, scale,
            spec, strides, mask_strides,
        )  # fmt: skip
        return out, lse
    short = None
    if nk <= SHORT_KEYS and not (spec.may_be_empty or is_causal):
        short = SHORT.choose(chip, kind, size_d, covered(nk, 128))
    if short is not None:
        fill = triton.cdiv(2 * multiprocessors(query.device.index), batches * heads)
        shares = min(triton.cdiv(nq, short.block_m), fill)
        launch(
            _attention_short_fwd_kernel, (batches * heads * shares,),
            (query, key, value, out, lse, *strides, heads, group, nq, nk, shares, scale), SPEC=spec,
            KEY_CHUNKS=chunks(nk, 128), ONE_PASS=short.one_pass, BLOCK_M=short.block_m,
            num_warps=short.warps, num_stages=short.stages,
        )  # fmt: skip
        return out, lse
    config = STREAM.choose(chip, kind, size_d, triton.next_power_of_2(nk), spec.mask_kind != 0)
    tiles = triton.cdiv(nq, config.block_m)
    tensors = (query, key, value, out, lse, attn_mask, kv_lengths, query_offset, None, None)
    sizes = (heads * nq, nq, heads, group, nq, nk, tiles)
    launch(
        _attention_fwd_kernel, (batches * heads * tiles,),
        (*tensors, *strides, *mask_strides, *sizes, scale), SPEC=spec, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, STAGES=config.stages, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    return out, lse
