"""The gradient of an additive attention mask: dS, summed over what the mask was broadcast over.

One program owns a tile of the mask's gradient and a share of the (batch, head) pairs that the mask
was broadcast over, and recomputes their P and dS from query, key, value, grad_out and the row sums
that the backward left: two products a pair. Shares are added in order by a second kernel, so the
result is the same on every run. Bytes moved: query, key, value and grad_out once a tile, mostly out
of L2; the mask's gradient once, in float32 once more a share.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_parts import (
    MASK_STRIDES,
    SIZES,
    causal_offset,
    head_offset,
    load_lse,
    mask_scores,
    probabilities,
    score_unit,
    visible_keys,
)
from .launch import empty, launch, multiprocessors
from .sums import sum_shares
from .tiles import dot_rows, load_tile, wide

_STRIDES = [f"stride_{t}{d}" for t in "qkvg" for d in "bhn"]


@triton.jit(
    do_not_specialize=[
        *_STRIDES,
        *MASK_STRIDES,
        *SIZES,
        "batches",
        "mask_batches",
        "mask_heads",
        "tiles_q",
        "tiles_k",
        "shares",
    ]
)
def _attention_mask_grad_kernel(
    grad_out, query, key, value, lse, delta, correction, mask, kv_lengths, query_offset, result,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gn,
    stride_mb, stride_mh, stride_mq, stride_mk,
    batches, heads, group, nq, nk, mask_batches, mask_heads, tiles_q, tiles_k, shares, scale,
    SPEC: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Result [shares, mask batches, mask heads, Nq or 1, Nk or 1]: sums of dS, a share each."""
    owner = tl.program_id(0)
    first_key = owner % tiles_k * BLOCK_N
    owner = owner // tiles_k
    first_row = owner % tiles_q * BLOCK_M
    owner = owner // tiles_q
    mask_head = owner % mask_heads
    owner = owner // mask_heads
    mask_batch = owner % mask_batches
    share = owner // mask_batches
    rows_end = nq
    keys_stop = nk
    if MASK_ROWS:
        rows_end = first_row + BLOCK_M
    if MASK_KEYS:
        keys_stop = first_key + BLOCK_N
    unit = score_unit(scale, SPEC)
    lane = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    pairs = (batches // mask_batches) * (heads // mask_heads)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for pair in range(pairs * share // shares, pairs * (share + 1) // shares):
        # Broadcast dimensions are walked, the others are the tile's own.
        batch = mask_batch + pair // (heads // mask_heads)
        head = mask_head + pair % (heads // mask_heads)
        q_head = query + head_offset(batch, head, stride_qb, stride_qh, SPEC.vec)
        g_head = grad_out + head_offset(batch, head, stride_gb, stride_gh, SPEC.vec)
        k_head = key + head_offset(batch, head // group, stride_kb, stride_kh, SPEC.vec)
        v_head = value + head_offset(batch, head // group, stride_vb, stride_vh, SPEC.vec)
        m_head = mask + head_offset(batch, head, stride_mb, stride_mh, SPEC.mask_vec)
        rows = (wide(batch) * heads + head) * nq
        keys_end = visible_keys(batch, nk, kv_lengths)
        offset = causal_offset(batch, query_offset)
        for m in range(first_row, rows_end, BLOCK_M):
            keep = m + lane < nq
            start = wide(m)
            q = load_tile(
                q_head + start * (stride_qn * SPEC.vec),
                lane * (stride_qn * SPEC.vec),
                keep,
                SPEC.d,
                SPEC.chunks,
                True,
            )
            g = load_tile(
                g_head + start * (stride_gn * SPEC.vec),
                lane * (stride_gn * SPEC.vec),
                keep,
                SPEC.d,
                SPEC.chunks,
                True,
            )
            row_lse = load_lse(lse + rows, m + lane, keep)
            row_delta = tl.load(delta + rows + m + lane, mask=keep, other=0.0)
            row_correction = tl.load(correction + rows + m + lane, mask=keep, other=0.0)
            for n in range(first_key, keys_stop, BLOCK_N):
                there = n + column < keys_end
                k = load_tile(
                    k_head + wide(n) * (stride_kn * SPEC.vec),
                    column * (stride_kn * SPEC.vec),
                    there,
                    SPEC.d,
                    SPEC.chunks,
                    True,
                )
                v = load_tile(
                    v_head + wide(n) * (stride_vn * SPEC.vec),
                    column * (stride_vn * SPEC.vec),
                    there,
                    SPEC.d,
                    SPEC.chunks,
                    True,
                )
                scores = mask_scores(
                    dot_rows(q, k, SPEC.precision), m_head, stride_mq, stride_mk, m, n,
                    lane[:, None], column[None, :], nq, keys_end, offset, scale, SPEC, True,
                    SPEC.causal,
                )  # fmt: skip
                p = probabilities(scores, row_lse[:, None], row_correction[:, None], unit, SPEC)
                total += p * (dot_rows(g, v, SPEC.precision) - row_delta[:, None])
    row = (first_row + lane)[:, None]
    key_index = (first_key + column)[None, :]
    width = nk
    if not MASK_ROWS:
        total = tl.sum(total, 0, keep_dims=True)
        row = tl.zeros([1, 1], tl.int32)
        nq = 1
    if not MASK_KEYS:
        total = tl.sum(total, 1, keep_dims=True)
        key_index = tl.zeros([1, 1], tl.int32)
        width = 1
    result += ((wide(share) * mask_batches + mask_batch) * mask_heads + mask_head) * nq * width
    tl.store(
        result + wide(row) * width + key_index,
        total.to(result.dtype.element_ty),
        mask=(row < nq) & (key_index < width),
    )


def mask_gradient(
    grad_mask,
    grad_out,
    query,
    key,
    value,
    lse,
    delta,
    correction,
    attn_mask,
    kv_lengths,
    query_offset,
    spec,
    strides,
    config,
    scale,
) -> None:
    """dS summed to the mask's shape; in shares where too few programs would fill the chip."""
    batches, heads, nq, _ = query.shape
    kv_heads, nk = key.shape[1], key.shape[2]
    mask_batches, mask_heads, mask_rows, mask_keys = attn_mask.shape
    tiles_q = triton.cdiv(nq, config.block_m) if mask_rows > 1 else 1
    tiles_k = triton.cdiv(nk, config.block_n) if mask_keys > 1 else 1
    tiles = mask_batches * mask_heads * tiles_q * tiles_k
    pairs = (batches // mask_batches) * (heads // mask_heads)
    shares = min(pairs, triton.cdiv(4 * multiprocessors(query.device.index), tiles))
    partial = empty(lse, shares, *grad_mask.shape) if shares > 1 else grad_mask
    tensors = (grad_out, query, key, value, lse, delta, correction, attn_mask, kv_lengths)
    sizes = (batches, heads, heads // kv_heads, nq, nk, mask_batches, mask_heads)
    launch(
        _attention_mask_grad_kernel, (tiles * shares,),
        (*tensors, query_offset, partial, *strides, *sizes, tiles_q, tiles_k, shares, scale),
        SPEC=spec, MASK_ROWS=mask_rows > 1, MASK_KEYS=mask_keys > 1, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if shares > 1:
        sum_shares(partial, grad_mask)
