"""varlen_attention: attention of packed sequences, by the streaming kernels of attention.py.

Query [T, H, D] and key, value [Tk, Hkv, D] hold the sequences after each other; int32 offsets [S +
1] say where each begins. One program owns one query tile of one (sequence, head), or a key block in
the backward, found by program id from the longest lengths; programs past the end of their sequence
leave. Causal is bottom-right within each sequence. Rows past the last offset belong to no sequence:
out and gradients are 0 there, and lse is -inf.
"""

from __future__ import annotations

import torch
import triton

from .attention import STREAM, _attention_fwd_kernel
from .attention_backward import run_backward
from .attention_parts import covered, make_spec, positive_scale
from .configs import kind_of
from .launch import capability, empty, launch
from .replay import replayed


@replayed
def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [T, H, D] in the query's dtype and lse float32 [H, T]; arguments as in the schema."""
    tokens, heads, d = query.shape
    kv_heads = key.shape[1]
    sequences = cu_seqlens_q.numel() - 1
    out = empty(query, tokens, heads, d).zero_()
    lse = empty(query, heads, tokens, dtype=torch.float32).fill_(float("-inf"))
    if out.numel() == 0 or key.shape[0] == 0 or min(sequences, max_seqlen_q, max_seqlen_k) <= 0:
        return out, lse
    query, scale = positive_scale(query, scale)
    views = tuple(x.transpose(0, 1) for x in (query, key, value, out))
    spec, strides, mask_strides = make_spec(views, None, is_causal, True)
    kind, chip = kind_of(query.dtype, spec.precision), capability(query)
    config = STREAM.choose(chip, kind, covered(d), triton.next_power_of_2(max_seqlen_k))
    tiles = triton.cdiv(max_seqlen_q, config.block_m)
    tensors = (query, key, value, out, lse, None, None, None, cu_seqlens_q, cu_seqlens_k)
    sizes = (0, tokens, heads, heads // kv_heads, max_seqlen_q, max_seqlen_k, tiles)
    launch(
        _attention_fwd_kernel,
        (sequences * heads * tiles,),
        (*tensors, *strides, *mask_strides, *sizes, scale),
        SPEC=spec,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STAGES=config.stages,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out, lse


@replayed
def varlen_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, contiguous and in their shapes."""
    tokens, heads, _ = query.shape
    kv_heads = key.shape[1]
    sequences = cu_seqlens_q.numel() - 1
    grads = tuple(empty(x, *x.shape).zero_() for x in (query, key, value))
    if out.numel() == 0 or key.shape[0] == 0 or min(sequences, max_seqlen_q, max_seqlen_k) <= 0:
        return grads[0], grads[1], grads[2]
    if grad_out.stride(2) != 1:
        grad_out = grad_out.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    sign = scale
    query, scale = positive_scale(query, scale)
    q, k, v, o = (x.transpose(0, 1) for x in (query, key, value, out))
    run_backward(
        grad_out.transpose(0, 1), grad_lse, q, k, v, o, lse, None, None, None, cu_seqlens_q,
        cu_seqlens_k, grads, is_causal, scale, (0, tokens), sequences, heads, kv_heads,
        max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    if sign < 0:
        grads[0].neg_()
    elif sign == 0:
        grads[0].zero_()
        grads[1].zero_()
    return grads[0], grads[1], grads[2]
