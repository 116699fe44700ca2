"""Attention backward, deterministic: no atomics, every sum in a fixed order.

    P = exp(scale * q k^T + mask - lse)     delta_i = sum_d grad_out[i, d] out[i, d] - grad_lse[i]
    dS = P * (grad_out value^T - delta)
    grad_value = P^T grad_out    grad_key = scale * dS^T query    grad_query = scale * dS key
    grad_mask = dS, summed over what the mask was broadcast over

`_attention_bwd_kernel` is one source for four kernels:

* "delta": one program owns a query tile and writes its delta; for additive masks and in IEEE
  float32 also the factor by which a log-sum-exp rounded to float32 misses a row's sum, which is all
  of it where every score is near finfo.min. There it sums P anew, and delta as sum_j P * dP.
* "kv": one program owns a key block and passes all query rows by it; grad_key, grad_value.
* "q": one program owns a query tile and passes all keys by it; grad_query.
* "all", for short sequences: one program owns a (batch, key head) and does the three after each
  other, so that a head comes from memory once and is then in cache: 8 tensors and the log-sum-exp
  move, in one launch.

P is computed twice, in seven products instead of five: the five-product form needs gradients of a
whole head in registers, or atomics. The mask's gradient has a kernel of its own
(attention_mask_grad.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_backward_parts import delta_tile, kv_block, q_tile
from .attention_configs import (
    KV_BACKWARD,
    MASK_GRAD,
    Q_BACKWARD,
    SHORT_BACKWARD,
    BackwardConfig,
)
from .attention_mask_grad import mask_gradient
from .attention_parts import (
    MASK_STRIDES,
    SIZES,
    causal_offset,
    covered,
    head_offset,
    make_spec,
    positive_scale,
    score_unit,
    sequence,
    visible_keys,
)
from .configs import kind_of
from .launch import capability, empty, launch
from .replay import replayed
from .tiles import wide

SHORT_ROWS = 256  # queries and keys of the longest head that one program is given

_STRIDES = [f"stride_{t}{d}" for t in "qkvg" for d in "bhn"]
_OUT_STRIDES = ["stride_ob", "stride_oh", "stride_on"]
_NOT_SPECIALISED = [*_STRIDES, *MASK_STRIDES, *SIZES]


@triton.jit(do_not_specialize=[*_NOT_SPECIALISED, *_OUT_STRIDES, "stride_lb", "stride_lh", "tiles"])
def _attention_bwd_kernel(
    grad_out, grad_lse, query, key, value, out, lse, delta, correction, mask, kv_lengths,
    query_offset, offsets_q, offsets_k, grad_query, grad_key, grad_value,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gn,
    stride_ob, stride_oh, stride_on, stride_mb, stride_mh, stride_mq, stride_mk,
    stride_lb, stride_lh, heads, group, nq, nk, tiles, scale,
    SPEC: tl.constexpr, PHASES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """PHASES is "delta", "kv" or "q": a program owns tile `program_id % tiles` of one head (of one
    key head for "kv"). "all": a program owns a key head and does the three one after the other.
    """
    tile = tl.program_id(0) % tiles
    owner = tl.program_id(0) // tiles
    kv_heads = heads // group
    if PHASES == "kv" or PHASES == "all":
        batch, kv_head = owner // kv_heads, owner % kv_heads
        head = kv_head * group
    else:
        batch, head = owner // heads, owner % heads
        kv_head = head // group
    query += head_offset(batch, head, stride_qb, stride_qh, SPEC.vec)
    grad_out += head_offset(batch, head, stride_gb, stride_gh, SPEC.vec)
    out += head_offset(batch, head, stride_ob, stride_oh, SPEC.vec)
    key += head_offset(batch, kv_head, stride_kb, stride_kh, SPEC.vec)
    value += head_offset(batch, kv_head, stride_vb, stride_vh, SPEC.vec)
    rows = head_offset(batch, head, stride_lb, stride_lh, 1)
    offset = causal_offset(batch, query_offset)
    # The gradients lie as [B, N, H, D]; packed sequences as [T, H, D].
    grad_q_base = wide(batch) * nq * (heads * SPEC.d)
    grad_kv_base = wide(batch) * nk * (kv_heads * SPEC.d)
    stride_qn *= SPEC.vec
    stride_gn *= SPEC.vec
    stride_on *= SPEC.vec
    stride_kn *= SPEC.vec
    stride_vn *= SPEC.vec
    if offsets_q is not None:
        start_q, nq = sequence(offsets_q, batch, nq)
        start_k, nk = sequence(offsets_k, batch, nk)
        query += start_q * stride_qn
        grad_out += start_q * stride_gn
        out += start_q * stride_on
        rows += start_q
        key += start_k * stride_kn
        value += start_k * stride_vn
        grad_q_base = start_q * (heads * SPEC.d)
        grad_kv_base = start_k * (kv_heads * SPEC.d)
        offset = nk - nq
    grad_query += grad_q_base + wide(head) * SPEC.d
    grad_key += grad_kv_base + wide(kv_head) * SPEC.d
    grad_value += grad_kv_base + wide(kv_head) * SPEC.d
    lse += rows
    delta += rows
    if grad_lse is not None:
        grad_lse += rows
    if SPEC.corrected:
        correction += rows
    if SPEC.mask_kind != 0:
        mask += head_offset(batch, head, stride_mb, stride_mh, SPEC.mask_vec)
    mask_strides = (stride_mq, stride_mk)
    keys_end = visible_keys(batch, nk, kv_lengths)
    unit = score_unit(scale, SPEC)

    if PHASES == "kv":  # noqa: SIM102 (a constexpr decides, then a number)
        if tile * BLOCK_N < nk:
            kv_block(
                (query, grad_out, lse, delta, correction, stride_qn, stride_gn),
                (stride_qh * SPEC.vec, stride_gh * SPEC.vec, stride_lh, stride_mh * SPEC.mask_vec),
                key, value, stride_kn, stride_vn, mask, mask_strides, grad_key, grad_value,
                kv_heads * SPEC.d, tile * BLOCK_N, group, nq, nk, keys_end, offset, scale, unit,
                SPEC, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
    if PHASES == "q":  # noqa: SIM102
        if tile * BLOCK_M < nq:
            q_tile(
                (query, grad_out, lse, delta, correction, stride_qn, stride_gn), key, value,
                stride_kn, stride_vn, mask, mask_strides, grad_query, heads * SPEC.d,
                tile * BLOCK_M, nq, keys_end, offset, scale, unit, SPEC, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
    if PHASES == "delta":  # noqa: SIM102
        if tile * BLOCK_M < nq:
            delta_tile(
                (query, grad_out, lse, delta, correction, stride_qn, stride_gn), key, value,
                stride_kn, stride_vn, mask, mask_strides, grad_lse, out, stride_on, tile * BLOCK_M,
                nq, keys_end, offset, scale, unit, SPEC, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    if PHASES == "all":
        q_head, g_head, o_head, m_head = query, grad_out, out, mask
        l_head, d_head, s_head, c_head = lse, delta, grad_lse, correction
        for _ in range(group):
            for first_row in range(0, nq, BLOCK_M):
                delta_tile(
                    (q_head, g_head, l_head, d_head, c_head, stride_qn, stride_gn), key, value,
                    stride_kn, stride_vn, m_head, mask_strides, s_head, o_head, stride_on,
                    first_row, nq, keys_end, offset, scale, unit, SPEC, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            q_head += stride_qh * SPEC.vec
            g_head += stride_gh * SPEC.vec
            o_head += stride_oh * SPEC.vec
            l_head += stride_lh
            d_head += stride_lh
            if grad_lse is not None:
                s_head += stride_lh
            if SPEC.corrected:
                c_head += stride_lh
            if SPEC.mask_kind != 0:
                m_head += stride_mh * SPEC.mask_vec
        tl.debug_barrier()  # delta goes through memory, from this program to itself
        for first_key in range(0, nk, BLOCK_N):
            kv_block(
                (query, grad_out, lse, delta, correction, stride_qn, stride_gn),
                (stride_qh * SPEC.vec, stride_gh * SPEC.vec, stride_lh, stride_mh * SPEC.mask_vec),
                key, value, stride_kn, stride_vn, mask, mask_strides, grad_key, grad_value,
                kv_heads * SPEC.d, first_key, group, nq, nk, keys_end, offset, scale, unit, SPEC,
                BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
        for _ in range(group):
            for first_row in range(0, nq, BLOCK_M):
                q_tile(
                    (query, grad_out, lse, delta, correction, stride_qn, stride_gn), key, value,
                    stride_kn, stride_vn, mask, mask_strides, grad_query, heads * SPEC.d, first_row,
                    nq, keys_end, offset, scale, unit, SPEC, BLOCK_M, BLOCK_N, STAGES,
                )  # fmt: skip
            query += stride_qh * SPEC.vec
            grad_out += stride_gh * SPEC.vec
            lse += stride_lh
            delta += stride_lh
            grad_query += SPEC.d
            if SPEC.corrected:
                correction += stride_lh
            if SPEC.mask_kind != 0:
                mask += stride_mh * SPEC.mask_vec


@replayed
def attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    attn_mask: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    query_offset: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    mask_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention backward; arguments and results as in the op's schema.

    Gradients of query [B, H, Nq, D] and of key and value [B, Hkv, Nk, D], in memory [B, N, H, D],
    and of the mask in its shape and dtype (size 0 without `mask_grad`).
    """
    batches, heads, nq, d = query.shape
    kv_heads, nk = key.shape[1], key.shape[2]
    grad_query = empty(query, batches, nq, heads, d).transpose(1, 2)
    grad_key = empty(query, batches, nk, kv_heads, d).transpose(1, 2)
    grad_value = empty(query, batches, nk, kv_heads, d).transpose(1, 2)
    if attn_mask is not None and mask_grad:
        grad_mask = empty(attn_mask, *attn_mask.shape)
    else:
        grad_mask = empty(query, 0)
    if out.numel() == 0 or nk == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_(), grad_mask.zero_()
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    if nk == 1:
        # P is 1, so dS is the gradient of lse alone: grad_out v - grad_out out is 0, but not after
        # the rounding of two sums.
        value, out = torch.zeros_like(value), torch.zeros_like(out)
    sign = scale
    query, scale = positive_scale(query, scale)
    delta, correction, spec, strides = run_backward(
        grad_out, grad_lse, query, key, value, out, lse, attn_mask, kv_lengths, query_offset, None,
        None, (grad_query, grad_key, grad_value), is_causal, scale, (heads * nq, nq), batches,
        heads, kv_heads, nq, nk,
    )  # fmt: skip
    if attn_mask is not None and mask_grad:
        kind = kind_of(query.dtype, spec.precision)
        size_n = triton.next_power_of_2(nk)
        config = MASK_GRAD.choose(capability(query), kind, covered(d), size_n)
        mask_gradient(
            grad_mask, grad_out, query, key, value, lse, delta, correction, attn_mask, kv_lengths,
            query_offset, spec, strides, config, scale,
        )  # fmt: skip
    if sign < 0:
        grad_query.neg_()
    elif sign == 0:
        grad_query.zero_()
        grad_key.zero_()
    return grad_query, grad_key, grad_value, grad_mask


def run_backward(
    grad_out,
    grad_lse,
    query,
    key,
    value,
    out,
    lse,
    attn_mask,
    kv_lengths,
    query_offset,
    offsets_q,
    offsets_k,
    grads,
    is_causal,
    scale,
    lse_strides,
    batches,
    heads,
    kv_heads,
    nq,
    nk,
):
    """Launches the kernels for dense or packed tensors given as [.., heads, tokens, D] views.

    `batches` counts batch entries or packed sequences; `nq` and `nk` are lengths or their bounds.
    """
    dense = offsets_q is None
    spec, strides, mask_strides = make_spec(
        (query, key, value, grad_out, out), attn_mask, is_causal, True
    )
    delta = empty(lse, *lse.shape)
    correction = empty(lse, *lse.shape) if spec.corrected else None
    tensors = (
        grad_out,
        grad_lse,
        query,
        key,
        value,
        out,
        lse,
        delta,
        correction,
        attn_mask,
        kv_lengths,
        query_offset,
        offsets_q,
        offsets_k,
        *grads,
    )
    group = heads // kv_heads

    def start(phases: str, config: BackwardConfig, owners: int, tiles: int) -> None:
        launch(
            _attention_bwd_kernel, (owners * tiles,),
            (*tensors, *strides, *mask_strides, *lse_strides, heads, group, nq, nk, tiles, scale),
            SPEC=spec, PHASES=phases, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            STAGES=config.stages, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    chip, kind = capability(query), kind_of(query.dtype, spec.precision)
    size_d, size_n = covered(spec.d), triton.next_power_of_2(nk)
    masked = spec.mask_kind != 0
    short = None
    if dense and max(nq, nk) <= SHORT_ROWS:
        short = SHORT_BACKWARD.choose(chip, kind, size_d, covered(nk, 128), masked)
    if short is not None:
        start("all", short, batches * kv_heads, 1)
    else:
        kv = KV_BACKWARD.choose(chip, kind, size_d, size_n, masked)
        q = Q_BACKWARD.choose(chip, kind, size_d, size_n, masked)
        start("delta", q, batches * heads, triton.cdiv(nq, q.block_m))
        start("kv", kv, batches * kv_heads, triton.cdiv(nk, kv.block_n))
        start("q", q, batches * heads, triton.cdiv(nq, q.block_m))
    return delta, correction, spec, (*strides[:12], *mask_strides)
