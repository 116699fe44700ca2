"""How attention runs on DTensors: each process its own images, or its own heads.

Without a strategy a DTensor raises at an operator that torch does not know. Both directions are
exact without communication: images and heads never meet in an attention.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ..registry import OPS

BACKENDS = ("cpu", "cuda", "triton", "reference")
IMAGES, HEADS = 0, 1


@lru_cache(maxsize=1)
def register() -> None:
    """Register the strategies of attention and its backward, once a process."""
    assert "attention" in OPS  # its schema is what the strategies below are written for
    for backend in BACKENDS:
        for operator, strategies in (("attention", _forward), ("attention_backward", _backward)):
            packet = getattr(torch.ops.patchgen_fast, operator)
            if backend in packet.overloads():
                register_sharding(getattr(packet, backend))(strategies)


def _forward(query, key, value, attn_mask, kv_lengths, query_offset, is_causal, scale):
    found = []
    for dim in _dims(query, key):
        masks = _masks(dim, attn_mask, kv_lengths, query_offset)
        found.append(([_place(dim)] * 2, [*[_place(dim)] * 3, *masks, None, None]))
    return found


def _backward(
    grad_out, grad_lse, query, key, value, out, lse, attn_mask, kv_lengths, query_offset,
    is_causal, scale, mask_grad,
):  # fmt: skip
    found = []
    # the gradient of a mask that all images or heads share would have to be summed over processes
    for dim in (None,) if mask_grad else _dims(query, key):
        place = _place(dim)
        inputs = [place, None if grad_lse is None else place, *[place] * 5]
        inputs += _masks(dim, attn_mask, kv_lengths, query_offset)
        found.append(([place] * 3 + [Replicate()], [*inputs, None, None, None]))
    return found


def _dims(query: Any, key: Any) -> list[int | None]:
    """None (each process everything), and the dimensions that divide evenly."""
    processes = query.mesh.size()
    even = [dim for dim in (IMAGES, HEADS) if key.shape[dim] % processes == 0]
    return [None, *even]


def _place(dim: int | None) -> Any:
    return Replicate() if dim is None else Shard(dim)


def _masks(dim: int | None, attn_mask: Any, kv_lengths: Any, query_offset: Any) -> list[Any]:
    places: list[Any] = [None, None, None]
    if attn_mask is not None:
        shared = dim is None or attn_mask.shape[dim] == 1
        places[0] = _place(None if shared else dim)
    for i, counts in ((1, kv_lengths), (2, query_offset)):
        if counts is not None:
            places[i] = Shard(0) if dim == IMAGES else Replicate()
    return places
