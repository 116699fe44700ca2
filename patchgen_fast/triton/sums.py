"""Sums over shares, added in order and not by atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .tiles import wide


@triton.jit(do_not_specialize=["count", "shares"])
def _sum_shares_kernel(partial, result, count, shares, BLOCK: tl.constexpr):
    """Result [count] = the sum of partial [shares, count], first share first."""
    index = wide(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for share in range(shares):
        part = tl.load(partial + wide(share) * count + index, mask=index < count, other=0.0)
        total += part.to(tl.float32)
    tl.store(result + index, total.to(result.dtype.element_ty), mask=index < count)


def sum_shares(partial: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Adds partial [shares, *result.shape] in order into `result`, rounding once."""
    count = result.numel()
    launch(
        _sum_shares_kernel,
        (triton.cdiv(count, 1024),),
        (partial, result, count, partial.shape[0]),
        BLOCK=1024,
        num_warps=4,
    )
    return result
