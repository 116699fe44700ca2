"""Attention weights on request: fused kernels never make them, so they are made beside the kernel.

Layers hand what their attention saw to `record`, which does nothing unless a `recording` is open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_open: list[tuple[int, Tensor]] | None = None


@contextmanager
def recording() -> Iterator[list[tuple[int, Tensor]]]:
    """Collect `(id of the layer, weights [B, H, Nq, Nk] in float32)` of every attention inside.

    Not for compiled models, and one recording at a time.
    """
    global _open
    if _open is not None:
        raise RuntimeError("expected one recording at a time, got another inside; close it first")
    _open = []
    try:
        yield _open
    finally:
        _open = None


def is_recording() -> bool:
    """Whether somebody wants the weights now."""
    return _open is not None


def record(
    owner: Any,
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    query_offset: int = 0,
) -> None:
    """Note the weights of one attention, as its arguments give them."""
    if _open is not None:
        weights = attention_weights(query, key, attn_mask, is_causal, scale, query_offset)
        _open.append((id(owner), weights))


@torch.no_grad()
def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    query_offset: int = 0,
) -> Tensor:
    """`softmax(scale * query @ key.T + mask)` as float32 `[B, H, Nq, Nk]`; empty rows are 0."""
    query, key = query.float(), key.float()
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    if is_causal:
        rows = torch.arange(query.shape[2], device=query.device)[:, None] + query_offset
        future = torch.arange(key.shape[2], device=query.device) > rows
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(dim=-1).nan_to_num(0.0)
