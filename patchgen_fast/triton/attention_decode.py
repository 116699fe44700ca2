"""Attention for a few queries against many keys: the step of a generator with a key-value cache.

The Nq query rows of all heads that share a key head are one tile, so a key is read once for all of
them. Where there are too few (batch, key head) pairs to fill the chip the keys are split: one
program owns one share of one pair's keys and writes its maximum, sum and unnormalised output in
float32; `_attention_combine_kernel` joins the shares of a row in order. Shares are cut by
`kv_lengths` on the device. Bytes moved: key and value once, to the length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_configs import DECODE
from .attention_parts import (
    MASK_STRIDES,
    SIZES,
    Spec,
    causal_offset,
    covered,
    finite_maximum,
    head_offset,
    inverse_and_lse,
    online_softmax_update,
    rescaling,
    score_unit,
    visible_keys,
)
from .configs import kind_of
from .launch import capability, empty, launch, multiprocessors
from .tiles import (
    MASK_ADDITIVE,
    MASK_BOOL,
    dot_rows,
    load_tile,
    scale_tile,
    store_tile,
    wide,
    zeros_tile,
)

MAX_ROWS = 64  # query rows of all heads that share a key head
MAX_QUERIES = 16
MIN_KEYS = 64


_STRIDES = [f"stride_{t}{d}" for t in "qkvo" for d in "bhn"]


@triton.jit(do_not_specialize=[*_STRIDES, *MASK_STRIDES, *SIZES, "shares"])
def _attention_decode_kernel(
    query, key, value, out, lse, partial, statistics, mask, kv_lengths, query_offset,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    stride_mb, stride_mh, stride_mq, stride_mk,
    heads, group, nq, nk, shares, scale,
    SPEC: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0) % shares
    pair = tl.program_id(0) // shares
    kv_heads = heads // group
    batch, kv_head = pair // kv_heads, pair % kv_heads
    lane = tl.arange(0, ROWS)
    keep = lane < group * nq
    head = kv_head * group + lane // nq
    row = lane % nq
    key += head_offset(batch, kv_head, stride_kb, stride_kh, SPEC.vec)
    value += head_offset(batch, kv_head, stride_vb, stride_vh, SPEC.vec)
    places = (wide(head) * stride_qh + wide(row) * stride_qn + wide(batch) * stride_qb) * SPEC.vec
    q = load_tile(query, places, keep, SPEC.d, SPEC.chunks, True)
    keys_end = visible_keys(batch, nk, kv_lengths)
    offset = causal_offset(batch, query_offset)
    unit = score_unit(scale, SPEC)
    a_share = tl.cdiv(tl.cdiv(keys_end, shares), BLOCK_N) * BLOCK_N
    begin = share * a_share
    end = tl.minimum(begin + a_share, keys_end)
    if SPEC.mask_kind != 0:
        masks = mask + (
            wide(batch) * stride_mb + wide(head) * stride_mh + wide(row) * stride_mq
        ) * SPEC.mask_vec  # fmt: skip

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    tile = zeros_tile(ROWS, SPEC.chunks)
    column = tl.arange(0, BLOCK_N)
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        there = first + column < end
        k = load_tile(key + wide(first) * (stride_kn * SPEC.vec), column * (stride_kn * SPEC.vec),
                      there, SPEC.d, SPEC.chunks, True)  # fmt: skip
        scores = dot_rows(q, k, SPEC.precision)
        if SPEC.natural:
            scores *= scale
        seen = there[None, :]
        if SPEC.causal:
            seen = seen & ((first + column)[None, :] <= (row + offset)[:, None])
        if SPEC.mask_kind != 0:
            pointers = masks[:, None] + wide(first + column)[None, :] * stride_mk
            inside = keep[:, None] & there[None, :]
        if SPEC.mask_kind == MASK_BOOL:
            seen = seen & (tl.load(pointers, mask=inside, other=0) != 0)
        if SPEC.mask_kind == MASK_ADDITIVE:
            bias = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
            scores += bias
        scores = tl.where(seen, scores, float("-inf"))
        v = load_tile(value + wide(first) * (stride_vn * SPEC.vec), column * (stride_vn * SPEC.vec),
                      there, SPEC.d, SPEC.chunks, True)  # fmt: skip
        maximum, total, tile = online_softmax_update(scores, v, maximum, total, tile, unit, SPEC)
    rows = (wide(batch) * heads + head) * nq + row
    if SPLIT:
        rows = share * (tl.num_programs(0) // shares).to(tl.int64) * (group * nq) + rows
        store_tile(partial, rows * SPEC.d, keep, tile, SPEC.d, SPEC.chunks)
        tl.store(statistics + 2 * rows, maximum, mask=keep)
        tl.store(statistics + 2 * rows + 1, total, mask=keep)
    else:
        inverse, row_lse = inverse_and_lse(
            finite_maximum(maximum, SPEC.may_be_empty), total, unit, SPEC
        )
        places = wide(batch) * stride_ob + wide(head) * stride_oh + wide(row) * stride_on
        tile = scale_tile(tile, inverse)
        store_tile(out, places * SPEC.vec, keep, tile, SPEC.d, SPEC.chunks)
        tl.store(lse + rows, row_lse, mask=keep)


@triton.jit(do_not_specialize=["stride_ob", "stride_oh", "stride_on", "heads", "nq", "shares"])
def _attention_combine_kernel(
    partial, statistics, out, lse, stride_ob, stride_oh, stride_on, heads, nq, shares, scale,
    SPEC: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program owns one row: sum_s exp(max_s - max) of sums and outputs, first share first."""
    row = wide(tl.program_id(0))
    rows = tl.num_programs(0).to(tl.int64)
    unit = score_unit(scale, SPEC)
    column = tl.arange(0, WIDTH)
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    result = tl.zeros([1, WIDTH], tl.float32)
    one = tl.zeros([1], tl.int64)
    for share in range(shares):
        place = share * rows + row + one
        other = tl.load(statistics + 2 * place)
        new = tl.maximum(maximum, other)
        shift = finite_maximum(new, True)
        mine = rescaling(maximum - shift, unit, SPEC)
        theirs = rescaling(other - shift, unit, SPEC)
        total = total * mine + tl.load(statistics + 2 * place + 1) * theirs
        part = tl.load(partial + (place * SPEC.d)[:, None] + column[None, :],
                       mask=(column < SPEC.d)[None, :], other=0.0)  # fmt: skip
        result = result * mine[:, None] + part * theirs[:, None]
        maximum = new
    inverse, row_lse = inverse_and_lse(finite_maximum(maximum, True), total, unit, SPEC)
    query = row % nq
    head = row // nq % heads
    batch = row // nq // heads
    start = (batch * stride_ob + head * stride_oh + query * stride_on) * SPEC.vec
    result = (result * inverse[:, None]).to(out.dtype.element_ty)
    tl.store(out + start + column[None, :], result, mask=(column < SPEC.d)[None, :])
    tl.store(lse + row + one, row_lse)


def fits(nq: int, group: int, nk: int) -> bool:
    """Whether a call is a decoding step: few rows a key head, and keys worth splitting."""
    return nq <= MAX_QUERIES and nq * group <= MAX_ROWS and nk >= MIN_KEYS


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    attn_mask: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    query_offset: torch.Tensor | None,
    scale: float,
    spec: Spec,
    strides: tuple[int, ...],
    mask_strides: tuple[int, ...],
) -> None:
    """Fills out [B, H, Nq, D] and lse [B, H, Nq]; `spec` and strides as `make_spec` gives them."""
    batches, heads, nq, d = query.shape
    kv_heads, nk = key.shape[1], key.shape[2]
    group = heads // kv_heads
    kind = kind_of(query.dtype, spec.precision)
    config = DECODE.choose(capability(query), kind, covered(d), triton.next_power_of_2(nk))
    pairs = batches * kv_heads
    fill = triton.cdiv(2 * multiprocessors(query.device.index), pairs)
    shares = max(1, min(fill, nk // (2 * config.block_n)))
    partial = statistics = lse
    if shares > 1:
        partial = empty(lse, shares, *lse.shape, d)
        statistics = empty(lse, shares, *lse.shape, 2)
    tensors = (query, key, value, out, lse, partial, statistics, attn_mask, kv_lengths)
    launch(
        _attention_decode_kernel, (pairs * shares,),
        (*tensors, query_offset, *strides, *mask_strides, heads, group, nq, nk, shares, scale),
        SPEC=spec, SPLIT=shares > 1, ROWS=max(16, triton.next_power_of_2(group * nq)),
        BLOCK_N=config.block_n, STAGES=config.stages, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    if shares > 1:
        launch(
            _attention_combine_kernel,
            (lse.numel(),),
            (partial, statistics, out, lse, *strides[9:12], heads, nq, shares, scale),
            SPEC=spec._replace(may_be_empty=True),
            WIDTH=triton.next_power_of_2(d),
            num_warps=1 if d <= 64 else 2,
        )
