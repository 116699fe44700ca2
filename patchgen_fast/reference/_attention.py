"""Attention, dense and packed: forward and explicit backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arithmetic import arithmetic_dtype, nothing


def attendable(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    kv_lengths: Tensor | None,
    query_offset: Tensor | None,
    is_causal: bool,
) -> Tensor | None:
    """Which key each query sees: bool, broadcastable to ``[B, H, Nq, Nk]``; None where all see all.

    Joined: a bool mask's True, a float mask above -inf, ``j < kv_lengths[b]``, and, when causal,
    ``j <= i + query_offset[b]``.
    """
    keys = torch.arange(key.shape[2], device=key.device)
    conditions = []
    if attn_mask is not None:
        conditions.append(attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf)
    if kv_lengths is not None:
        conditions.append(keys < kv_lengths.view(-1, 1, 1, 1))
    if is_causal:
        last = torch.arange(query.shape[2], device=query.device).view(1, 1, -1, 1)
        if query_offset is not None:
            last = last + query_offset.view(-1, 1, 1, 1)
        conditions.append(keys <= last)
    if not conditions:
        return None
    seen = conditions[0]
    for condition in conditions[1:]:
        seen = seen & condition
    return seen


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _attention_scores(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, seen: Tensor | None, scale: float
) -> Tensor:
    scores = (query * scale) @ key.mT
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(scores.dtype)
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    query_offset: Tensor | None = None,
    is_causal: bool = False,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    return_lse: bool = True,
    *,
    arithmetic: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale * query @ key.T + mask) @ value`` and its log-sum-exp.

    A row that sees no key gives 0, and -inf.
    """
    work = arithmetic or arithmetic_dtype(query.dtype)
    heads = query.shape[1]
    q, k, v = (
        query.to(work),
        _repeat_heads(key.to(work), heads),
        _repeat_heads(value.to(work), heads),
    )
    seen = attendable(query, key, attn_mask, kv_lengths, query_offset, is_causal)
    scores = _attention_scores(q, k, attn_mask, seen, scale)
    if seen is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        # A row that sees nothing is a softmax over all -inf: NaN, and NaN in its gradient too,
        # unless its scores are finite before and its weights 0 after.
        blind = ~seen.any(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    lse = None
    if return_lse:
        lse = _log_sum_exp(scores, seen).to(arithmetic_dtype(query.dtype))
    out = F.dropout(weights, dropout_p) @ v
    return out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def _log_sum_exp(scores: Tensor, seen: Tensor | None) -> Tensor:
    blind = None
    if seen is not None:
        blind = ~seen.any(-1, keepdim=True)
        scores = scores.masked_fill(blind, 0.0)
    if scores.shape[-1] == 0:
        return torch.logsumexp(scores, dim=-1)
    # Not torch.logsumexp: its gradient is exp(scores - lse), and under a mask of finfo.min lse has
    # no digits left for the logarithm of the number of keys.
    highest = scores.detach().amax(-1, keepdim=True)
    lse = ((scores - highest).exp().sum(-1, keepdim=True).log() + highest).squeeze(-1)
    return lse if blind is None else lse.masked_fill(blind.squeeze(-1), -torch.inf)


def attention_lse(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    kv_lengths: Tensor | None,
    query_offset: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """The log-sum-exp alone, ``[B, H, Nq]``, for compositions whose softmax keeps it to itself."""
    work = arithmetic_dtype(query.dtype)
    seen = attendable(query, key, attn_mask, kv_lengths, query_offset, is_causal)
    k = _repeat_heads(key.to(work), query.shape[1])
    return _log_sum_exp(_attention_scores(query.to(work), k, attn_mask, seen, scale), seen)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    kv_lengths: Tensor | None,
    query_offset: Tensor | None,
    is_causal: bool,
    scale: float,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mask.

    With P the weights and ``dP = grad_out @ V.T``, ``dS = P * (dP - delta + grad_lse)``, where
    delta is a row's ``sum(P * dP)``. Kernels take the equal ``sum(grad_out * out)`` for it
    (FlashAttention-2, Dao 2023, section 3.1), which costs no pass over the keys, and some digits.
    """
    work = arithmetic_dtype(query.dtype)
    heads, kv_heads = query.shape[1], key.shape[1]
    q, k, v = (
        query.to(work),
        _repeat_heads(key.to(work), heads),
        _repeat_heads(value.to(work), heads),
    )
    grad = grad_out.to(work)
    seen = attendable(query, key, attn_mask, kv_lengths, query_offset, is_causal)
    scores = _attention_scores(q, k, attn_mask, seen, scale)
    blind = lse == -torch.inf
    # Not exp(scores - lse): under a mask of finfo.min, lse has no digits left for the logarithm of
    # the number of keys.
    weights = torch.softmax(scores, dim=-1).masked_fill(blind.unsqueeze(-1), 0.0)
    grad_weights = grad @ v.mT
    delta = (weights * grad_weights).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.masked_fill(blind, 0.0).to(work)
    grad_scores = weights * (grad_weights - delta.unsqueeze(-1))
    grad_query = grad_scores @ k * scale
    grad_key = grad_scores.mT @ q * scale
    grad_value = weights.mT @ grad
    if heads != kv_heads:
        groups = (kv_heads, heads // kv_heads)
        grad_key, grad_value = (g.unflatten(1, groups).sum(2) for g in (grad_key, grad_value))
    grad_mask = nothing(query)
    if mask_grad and attn_mask is not None:
        grad_mask = grad_scores.sum_to_size(attn_mask.shape).to(attn_mask.dtype).contiguous()
    rows = [
        g.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        for g in (grad_query, grad_key, grad_value)
    ]
    return rows[0], rows[1], rows[2], grad_mask


def _sequence_mask(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, tokens_q: int, tokens_k: int, is_causal: bool
) -> Tensor:
    """Which packed key each packed query sees, bool ``[1, 1, Tq, Tk]``: those of its own sequence.

    Causal is bottom-right within each sequence; tokens past the last offset see nothing.
    """
    device = cu_seqlens_q.device
    rows, keys = torch.arange(tokens_q, device=device), torch.arange(tokens_k, device=device)
    row_sequence = torch.searchsorted(cu_seqlens_q[1:], rows, right=True)
    key_sequence = torch.searchsorted(cu_seqlens_k[1:], keys, right=True)
    seen = row_sequence[:, None] == key_sequence[None, :]
    seen = seen & (rows < cu_seqlens_q[-1])[:, None] & (keys < cu_seqlens_k[-1])[None, :]
    if is_causal and cu_seqlens_q.shape[0] > 1:
        # Counted from the end of its sequence, a query sees the keys that lie no later than it.
        ends_q = cu_seqlens_q[1:][row_sequence.clamp(max=cu_seqlens_q.shape[0] - 2)]
        ends_k = cu_seqlens_k[1:][key_sequence.clamp(max=cu_seqlens_k.shape[0] - 2)]
        seen = seen & ((keys - ends_k)[None, :] <= (rows - ends_q)[:, None])
    return seen[None, None]


def _packed(x: Tensor) -> Tensor:
    """``[T, H, D]`` as one sequence of a batch of one, ``[1, H, T, D]``."""
    return x.transpose(0, 1).unsqueeze(0)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    scale: float = 1.0,
    *,
    arithmetic: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences: ``attention`` of all tokens under a block-diagonal mask."""
    seen = _sequence_mask(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0], is_causal)
    out, lse = attention(
        _packed(query),
        _packed(key),
        _packed(value),
        seen,
        is_causal=False,
        scale=scale,
        arithmetic=arithmetic,
    )
    assert lse is not None
    return out.squeeze(0).transpose(0, 1).contiguous(), lse.squeeze(0)


def varlen_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each ``[T, H, D]``."""
    seen = _sequence_mask(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0], is_causal)
    grads = attention_backward(
        _packed(grad_out),
        None if grad_lse is None else grad_lse.unsqueeze(0),
        _packed(query),
        _packed(key),
        _packed(value),
        _packed(out),
        lse.unsqueeze(0),
        seen,
        None,
        None,
        False,
        scale,
        False,
    )
    query_grad, key_grad, value_grad = (
        g.squeeze(0).transpose(0, 1).contiguous() for g in grads[:3]
    )
    return query_grad, key_grad, value_grad
