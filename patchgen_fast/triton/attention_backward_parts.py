"""The three steps of the attention backward, each for one tile: delta, key block, query tile.

`q_side` is what belongs to the query rows of one head: query, grad_out, log-sum-exp, delta and
correction, each pointing at the head's (or sequence's) first row, and the strides of the first two.
`mask_strides` are those of a mask's rows and keys. See attention_backward.py for the formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_parts import load_lse, mask_scores, probabilities
from .tiles import add_dot, dot_rows, load_tile, store_tile, wide, zeros_tile


@triton.jit
def _row_sums(a, b):
    """sum over D of a * b, in float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


@triton.jit
def _scaled(tile, factor):
    scaled = ()
    for i in tl.static_range(len(tile)):
        scaled = scaled + (tile[i] * factor,)  # type: ignore[assignment]
    return scaled


@triton.jit
def _kept(tile, keep):
    kept = ()
    for i in tl.static_range(len(tile)):
        kept = kept + (tl.where(keep[:, None], tile[i], 0.0),)  # type: ignore[assignment]
    return kept


@triton.jit
def _sums_again(
    q, g, key, value, stride_kn, stride_vn, mask, mask_strides, row_lse, first_row, nq, keys_end,
    offset, scale, unit, SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a query tile: 1 / sum_j exp(score - lse), which is 1 but for the rounding of lse, and
    sum_j P * dP, which is sum_d grad_out * out but for the rounding of out.
    """
    lane = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M], tl.float32)
    product = tl.zeros([BLOCK_M], tl.float32)
    for first_key in range(0, keys_end, BLOCK_N):
        there = first_key + column < keys_end
        start = wide(first_key)
        k = load_tile(key + start * stride_kn, column * stride_kn, there, SPEC.d, SPEC.chunks, True)
        v = load_tile(
            value + start * stride_vn, column * stride_vn, there, SPEC.d, SPEC.chunks, True
        )
        scores = mask_scores(
            dot_rows(q, k, SPEC.precision), mask, mask_strides[0], mask_strides[1], first_row,
            first_key, lane[:, None], column[None, :], nq, keys_end, offset, scale, SPEC, True,
            SPEC.causal,
        )  # fmt: skip
        p = probabilities(scores, row_lse[:, None], 1.0, unit, SPEC)
        total += tl.sum(p, 1)
        product += tl.sum(p * dot_rows(g, v, SPEC.precision), 1)
    missed = tl.where(total > 0.0, 1.0 / total, 1.0)
    return missed, product * missed


@triton.jit
def delta_tile(
    q_side, key, value, stride_kn, stride_vn, mask, mask_strides, grad_lse, out, stride_on,
    first_row, nq, keys_end, offset, scale, unit,
    SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes delta and, where SPEC.corrected, the correction of one query tile of one head."""
    query, grad, lse, delta, correction, stride_qn, stride_gn = q_side
    lane = tl.arange(0, BLOCK_M)
    row = first_row + lane
    keep = row < nq
    start = wide(first_row)
    g = load_tile(grad + start * stride_gn, lane * stride_gn, keep, SPEC.d, SPEC.chunks, True)
    o = load_tile(out + start * stride_on, lane * stride_on, keep, SPEC.d, SPEC.chunks, True)
    row_lse = load_lse(lse, row, keep)
    row_delta = _row_sums(g, o)
    if SPEC.corrected:
        missed = tl.full([BLOCK_M], 1.0, tl.float32)
        # Beside numbers this large log(sum) is lost in a float32 log-sum-exp; in IEEE float32 the
        # rounding of any lse shows, and that of out where one key has nearly all the weight.
        if SPEC.precise or tl.min(tl.where(keep, row_lse, 0.0), 0) < -1e6:
            q = load_tile(
                query + start * stride_qn, lane * stride_qn, keep, SPEC.d, SPEC.chunks, True
            )
            missed, row_delta = _sums_again(
                q, g, key, value, stride_kn, stride_vn, mask, mask_strides, row_lse, first_row, nq,
                keys_end, offset, scale, unit, SPEC, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        tl.store(correction + row, missed, mask=keep)
    if grad_lse is not None:
        slope = tl.load(grad_lse + row, mask=keep, other=0.0)
        row_delta -= tl.where(
            row_lse == float("inf"), 0.0, slope
        )  # a row that saw nothing has none
    tl.store(delta + row, row_delta, mask=keep)


@triton.jit
def _pass_rows(
    grads, k, v, q_side, mask, mask_strides, first_key, begin, nq, keys_end, offset, scale,
    unit,
    SPEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds what the query rows from `begin` on of one head give to a key block's gradients."""
    query, grad, lse, delta, correction, stride_qn, stride_gn = q_side
    grad_k, grad_v = grads
    lane = tl.arange(0, BLOCK_M)
    for first_row in tl.range(begin, nq, BLOCK_M, num_stages=STAGES):
        row = first_row + lane
        keep = row < nq
        start = wide(first_row)
        q = load_tile(query + start * stride_qn, lane * stride_qn, keep, SPEC.d, SPEC.chunks, True)
        g = load_tile(grad + start * stride_gn, lane * stride_gn, keep, SPEC.d, SPEC.chunks, True)
        row_lse = load_lse(lse, row, keep)
        row_delta = tl.load(delta + row, mask=keep, other=0.0)
        row_correction = row_delta
        if SPEC.corrected:
            row_correction = tl.load(correction + row, mask=keep, other=0.0)
        scores = mask_scores(
            dot_rows(k, q, SPEC.precision), mask, mask_strides[0], mask_strides[1], first_row,
            first_key, lane[None, :], tl.arange(0, BLOCK_N)[:, None], nq, keys_end, offset, scale,
            SPEC, SPEC.mask_kind != 0, SPEC.causal,
        )  # fmt: skip
        p = probabilities(scores, row_lse[None, :], row_correction[None, :], unit, SPEC)
        grad_v = add_dot(grad_v, p.to(g[0].dtype), g, SPEC.precision)
        ds = p * (dot_rows(v, g, SPEC.precision) - row_delta[None, :])
        grad_k = add_dot(grad_k, ds.to(q[0].dtype), q, SPEC.precision)
    return grad_k, grad_v


@triton.jit
def kv_block(
    q_side, head_strides, key, value, stride_kn, stride_vn, mask, mask_strides,
    grad_key, grad_value, stride_on, first_key, group, nq, nk, keys_end, offset, scale, unit,
    SPEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value of one key block, over all query heads that share the key head.

    Keys past `keys_end` are garbage until the end, where they become 0: no row mixes with another.
    """
    query, grad, lse, delta, correction, stride_qn, stride_gn = q_side
    stride_qh, stride_gh, stride_lh, stride_mh = head_strides
    lane = tl.arange(0, BLOCK_N)
    keep = first_key + lane < keys_end
    start = wide(first_key)
    k = load_tile(key + start * stride_kn, lane * stride_kn, keep, SPEC.d, SPEC.chunks, True)
    v = load_tile(value + start * stride_vn, lane * stride_vn, keep, SPEC.d, SPEC.chunks, True)
    grads = (zeros_tile(BLOCK_N, SPEC.chunks), zeros_tile(BLOCK_N, SPEC.chunks))
    begin = 0
    if SPEC.causal:
        begin = tl.maximum(first_key - offset, 0) // BLOCK_M * BLOCK_M
    for _ in range(group):
        grads = _pass_rows(
            grads, k, v, (query, grad, lse, delta, correction, stride_qn, stride_gn), mask,
            mask_strides, first_key, begin, nq, keys_end, offset, scale, unit, SPEC, BLOCK_M,
            BLOCK_N, STAGES,
        )  # fmt: skip
        query += stride_qh
        grad += stride_gh
        lse += stride_lh
        delta += stride_lh
        if SPEC.mask_kind != 0:
            mask += stride_mh
        if SPEC.corrected:
            correction += stride_lh
    grad_k, grad_v = grads
    inside = first_key + lane < nk
    store_tile(
        grad_key + start * stride_on,
        lane * stride_on,
        inside,
        _kept(_scaled(grad_k, scale), keep),
        SPEC.d,
        SPEC.chunks,
    )
    store_tile(
        grad_value + start * stride_on,
        lane * stride_on,
        inside,
        _kept(grad_v, keep),
        SPEC.d,
        SPEC.chunks,
    )


@triton.jit
def _pass_keys(
    grad_q, q, g, row_lse, row_delta, row_correction, key, value, stride_kn, stride_vn, mask,
    mask_strides, first_row, begin, end, nq, offset, scale, unit,
    SPEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHECK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds what the keys from `begin` to `end` give to a query tile's gradient."""
    column = tl.arange(0, BLOCK_N)
    for first_key in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        keep = first_key + column < end
        start = wide(first_key)
        k = load_tile(key + start * stride_kn, column * stride_kn, keep, SPEC.d, SPEC.chunks, CHECK)
        v = load_tile(
            value + start * stride_vn, column * stride_vn, keep, SPEC.d, SPEC.chunks, CHECK
        )
        scores = mask_scores(
            dot_rows(q, k, SPEC.precision), mask, mask_strides[0], mask_strides[1], first_row,
            first_key, tl.arange(0, BLOCK_M)[:, None], column[None, :], nq, end, offset, scale,
            SPEC, CHECK, SPEC.causal and CHECK,
        )  # fmt: skip
        p = probabilities(scores, row_lse[:, None], row_correction[:, None], unit, SPEC)
        ds = p * (dot_rows(g, v, SPEC.precision) - row_delta[:, None])
        grad_q = add_dot(grad_q, ds.to(q[0].dtype), k, SPEC.precision)
    return grad_q


@triton.jit
def q_tile(
    q_side, key, value, stride_kn, stride_vn, mask, mask_strides, grad_query, stride_on,
    first_row, nq, keys_end, offset, scale, unit,
    SPEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grad_query of one query tile of one head."""
    query, grad, lse, delta, correction, stride_qn, stride_gn = q_side
    lane = tl.arange(0, BLOCK_M)
    row = first_row + lane
    keep = row < nq
    start = wide(first_row)
    q = load_tile(query + start * stride_qn, lane * stride_qn, keep, SPEC.d, SPEC.chunks, True)
    g = load_tile(grad + start * stride_gn, lane * stride_gn, keep, SPEC.d, SPEC.chunks, True)
    row_lse = load_lse(lse, row, keep)
    row_delta = tl.load(delta + row, mask=keep, other=0.0)
    row_correction = row_delta
    if SPEC.corrected:
        row_correction = tl.load(correction + row, mask=keep, other=0.0)
    full = keys_end
    if SPEC.causal:
        keys_end = tl.minimum(keys_end, tl.maximum(first_row + BLOCK_M + offset, 0))
        full = tl.minimum(full, tl.maximum(first_row + offset + 1, 0))
    full = full // BLOCK_N * BLOCK_N
    grad_q = zeros_tile(BLOCK_M, SPEC.chunks)
    grad_q = _pass_keys(
        grad_q, q, g, row_lse, row_delta, row_correction, key, value, stride_kn, stride_vn, mask,
        mask_strides, first_row, 0, full, nq, offset, scale, unit, SPEC, BLOCK_M, BLOCK_N, False,
        STAGES,
    )  # fmt: skip
    grad_q = _pass_keys(
        grad_q, q, g, row_lse, row_delta, row_correction, key, value, stride_kn, stride_vn, mask,
        mask_strides, first_row, full, keys_end, nq, offset, scale, unit, SPEC, BLOCK_M, BLOCK_N,
        True, 1,
    )  # fmt: skip
    store_tile(
        grad_query + start * stride_on,
        lane * stride_on,
        keep,
        _scaled(grad_q, scale),
        SPEC.d,
        SPEC.chunks,
    )
