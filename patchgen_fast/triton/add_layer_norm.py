"""add_layer_norm: residual sum and layer normalisation in one pass.

    sum = input + residual (rounded to its dtype)   normalised = (sum - mean) * rstd * weight + bias

Forward: one program owns a row, which stays in registers; input, residual, sum and normalised move
once. Backward: one program owns a share of the rows, passes them one by one, and keeps its sums for
weight and bias in registers; the shares are added in order by `sum_shares`. Arithmetic in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import empty, launch, multiprocessors
from .replay import replayed
from .sums import sum_shares
from .tiles import wide

MAX_FEATURES = 16384  # a row in the registers of 16 warps


@triton.jit(do_not_specialize=["eps"])
def _add_layer_norm_fwd_kernel(
    input, residual, weight, bias, normalised, total, mean, rstd, eps,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    there = column < FEATURES
    start = wide(row) * FEATURES
    x = tl.load(input + start + column, mask=there, other=0.0).to(tl.float32)
    x += tl.load(residual + start + column, mask=there, other=0.0).to(tl.float32)
    rounded = x.to(total.dtype.element_ty)
    tl.store(total + start + column, rounded, mask=there)
    x = rounded.to(tl.float32)
    centre = tl.sum(x, 0) / FEATURES
    x = tl.where(there, x - centre, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / FEATURES + eps)
    y = x * scale
    if weight is not None:
        y *= tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    tl.store(normalised + start + column, y.to(normalised.dtype.element_ty), mask=there)
    tl.store(mean + row, centre)
    tl.store(rstd + row, scale)


@triton.jit(do_not_specialize=["rows"])
def _add_layer_norm_bwd_kernel(
    grad_normalised, grad_sum, total, weight, mean, rstd, grad_input, partial_weight, partial_bias,
    rows, FEATURES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    there = column < FEATURES
    w = tl.full([BLOCK], 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    for row in range(share, rows, tl.num_programs(0)):
        start = wide(row) * FEATURES
        g = tl.load(grad_normalised + start + column, mask=there, other=0.0).to(tl.float32)
        x = tl.load(total + start + column, mask=there, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        x = tl.where(there, (x - tl.load(mean + row)) * scale, 0.0)
        weight_sum += g * x
        bias_sum += g
        g *= w
        g -= (tl.sum(g * x, 0) / FEATURES) * x + tl.sum(g, 0) / FEATURES
        g *= scale
        if grad_sum is not None:
            g += tl.load(grad_sum + start + column, mask=there, other=0.0).to(tl.float32)
        tl.store(grad_input + start + column, g.to(grad_input.dtype.element_ty), mask=there)
    tl.store(partial_weight + share * FEATURES + column, weight_sum, mask=there)
    tl.store(partial_bias + share * FEATURES + column, bias_sum, mask=there)


def _blocks(features: int) -> tuple[int, int]:
    block = triton.next_power_of_2(features)
    return block, min(16, max(1, block // 512))


@replayed
def add_layer_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(normalised, sum) in the input's shape and dtype; mean and rstd float32 [rows]."""
    input, residual = input.contiguous(), residual.contiguous()
    features = input.shape[-1]
    rows = input.numel() // features if features else 0
    normalised, total = empty(input, *input.shape), empty(input, *input.shape)
    mean = empty(input, rows, dtype=torch.float32)
    rstd = empty(input, rows, dtype=torch.float32)
    if rows:
        block, warps = _blocks(features)
        launch(
            _add_layer_norm_fwd_kernel,
            (rows,),
            (input, residual, weight, bias, normalised, total, mean, rstd, eps),
            FEATURES=features,
            BLOCK=block,
            num_warps=warps,
        )
    return normalised, total, mean, rstd


@replayed
def add_layer_norm_backward(
    grad_normalised: torch.Tensor,
    grad_sum: torch.Tensor | None,
    sum: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of the sum, and [features] those of weight and bias."""
    grad_normalised, sum = grad_normalised.contiguous(), sum.contiguous()
    if grad_sum is not None:
        grad_sum = grad_sum.contiguous()
    features, rows = sum.shape[-1], mean.numel()
    like = sum if weight is None else weight
    grad_input = empty(sum, *sum.shape)
    grad_weight, grad_bias = empty(like, features), empty(like, features)
    if rows == 0:
        return grad_input, grad_weight.zero_(), grad_bias.zero_()
    block, warps = _blocks(features)
    shares = min(rows, 2 * multiprocessors(sum.device.index))
    partial_weight = empty(mean, shares, features)
    partial_bias = empty(mean, shares, features)
    launch(
        _add_layer_norm_bwd_kernel,
        (shares,),
        (grad_normalised, grad_sum, sum, weight, mean, rstd, grad_input, partial_weight,
         partial_bias, rows),
        FEATURES=features,
        BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return grad_input, sum_shares(partial_weight, grad_weight), sum_shares(partial_bias, grad_bias)
