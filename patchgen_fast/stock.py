"""The "torch" backend: for each op the best composition of stock operators, with torch's own
autograd.

Peers that a kernel has to beat, and what runs where it does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


def _joined_mask(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    kv_lengths: Tensor | None,
    query_offset: Tensor | None,
    is_causal: bool,
) -> Tensor | None:
    """Mask, lengths and causality as the one mask that SDPA takes."""
    if kv_lengths is None and not is_causal:
        return attn_mask
    seen = reference.attendable(query, key, attn_mask, kv_lengths, query_offset, is_causal)
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return seen
    return attn_mask.masked_fill(~seen, -torch.inf)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    kv_lengths: Tensor | None,
    query_offset: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """``F.scaled_dot_product_attention``; the log-sum-exp, which it keeps to itself, is made
    apart.
    """
    plain_causal = is_causal and attn_mask is None and kv_lengths is None and query_offset is None
    mask = None
    if not plain_causal:
        mask = _joined_mask(query, key, attn_mask, kv_lengths, query_offset, is_causal)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        dropout_p,
        plain_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    lse = None
    if return_lse:
        lse = reference.attention_lse(
            query, key, attn_mask, kv_lengths, query_offset, is_causal, scale
        )
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse
