"""Tokens back to an image: the transposed convolution with stride = kernel.

``patch = token @ weight + bias``, laid row by row on the grid. Shapes: tokens ``[B, N, E]``,
weight ``[E, C, Ph, Pw]``, bias ``[C]``, grid (rows, columns) with rows * columns = N; images
``[B, C, rows * Ph, columns * Pw]``, contiguous, in the tokens' dtype. Sums in float32. The
backward saves tokens and weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference, stock, triton
from ..registry import Op
from ..triton import thresholds
from ._checks import autocast, check_float, check_same_dtype, check_shape, check_tensors
from ._refusals import NOT_FOR_TRITON, NOT_ON_CPU, float64_of


class PatchUnembedArguments(NamedTuple):
    tokens: Tensor
    weight: Tensor
    bias: Tensor | None
    grid_h: int
    grid_w: int


class PatchUnembedBackwardArguments(NamedTuple):
    grad_images: Tensor
    tokens: Tensor
    weight: Tensor
    bias_grad: bool


SCHEMA = "(Tensor tokens, Tensor weight, Tensor? bias, SymInt grid_h, SymInt grid_w) -> Tensor"
BACKWARD_SCHEMA = (
    "(Tensor grad_images, Tensor tokens, Tensor weight, bool bias_grad) -> "
    "(Tensor grad_tokens, Tensor grad_weight, Tensor grad_bias)"
)


def _fake(tokens, weight, bias, grid_h, grid_w):
    _, channels, height, width = weight.shape
    return tokens.new_empty((tokens.shape[0], channels, grid_h * height, grid_w * width))


def _backward_fake(grad_images, tokens, weight, bias_grad):
    grad_bias = weight.new_empty(weight.shape[1] if bias_grad else 0)
    return tokens.new_empty(tokens.shape), weight.new_empty(weight.shape), grad_bias


def _save(ctx, inputs, output):
    tokens, weight, bias, _, _ = inputs
    ctx.save_for_backward(tokens, weight)


def _backward(ctx, grad_images):
    tokens, weight = ctx.saved_tensors
    bias_grad = ctx.needs_input_grad[2]
    grad_tokens, grad_weight, grad_bias = OP.run_backward(
        ctx, grad_images, tokens, weight, bias_grad
    )
    return grad_tokens, grad_weight, grad_bias if bias_grad else None, None, None


def _flops(tokens_shape, weight_shape, *args, **kwargs) -> int:
    batch, tokens, embed = tokens_shape
    _, channels, height, width = weight_shape
    return 2 * batch * tokens * embed * channels * height * width


def _backward_flops(grad_shape, tokens_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * _flops(tokens_shape, weight_shape)


OP = Op(
    "patch_unembed",
    SCHEMA,
    BACKWARD_SCHEMA,
    PatchUnembedBackwardArguments,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
    reference=reference.patch_unembed,
    reference_backward=reference.patch_unembed_backward,
    flops=_flops,
    backward_flops=_backward_flops,
    prefer=thresholds.patch_unembed,
)


def _cpu_forward(tokens, weight, bias, grid_h, grid_w):
    raw = torch.ops.patchgen_fast_native.patch_unembed
    return raw(tokens, weight, bias, grid_h, grid_w)


FLOAT64 = float64_of("tokens")
OP.add_torch(stock.patch_unembed, refuses=(FLOAT64,))
OP.add_native(
    "cpu",
    refuses=(NOT_ON_CPU, FLOAT64),
    refuses_backward=(NOT_ON_CPU, FLOAT64),
    forward=_cpu_forward,
)
OP.add_kernels(
    "triton",
    "patchgen_fast.triton.patch_unembed:patch_unembed",
    "patchgen_fast.triton.patch_unembed:patch_unembed_backward",
    refuses=(NOT_FOR_TRITON, FLOAT64),
    refuses_backward=(NOT_FOR_TRITON, FLOAT64),
    unavailable=triton.unavailable_reason(),
)


def _check(tokens: Tensor, weight: Tensor, bias: Any, grid_size: tuple[int, int]) -> None:
    check_tensors("patch_unembed", {"tokens": tokens, "weight": weight}, bias=bias)
    check_shape("patch_unembed", "tokens", tokens, (None, None, None))
    check_float("patch_unembed", tokens=tokens)
    check_same_dtype("patch_unembed", tokens.dtype, "tokens", weight=weight, bias=bias)
    check_shape("patch_unembed", "weight", weight, (tokens.shape[2], None, None, None))
    check_shape("patch_unembed", "bias", bias, (weight.shape[1],))
    rows, columns = grid_size if isinstance(grid_size, (tuple, list)) else (grid_size, 0)
    if rows * columns != tokens.shape[1]:
        raise ValueError(
            f"patch_unembed: expected grid_size as (rows, columns) of {tokens.shape[1]} tokens; "
            f"got {grid_size}"
        )


def patch_unembed(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid_size: tuple[int, int],
    backend: str | None = None,
) -> Tensor:
    """Draw every token's patch, and put the patches together.

    Args:
        tokens: ``[B, N, E]`` in float32, bfloat16, float16 (float64: reference only).
        weight: ``[E, C, Ph, Pw]``, as of a transposed convolution, in the tokens' dtype.
        bias: ``[C]`` in the tokens' dtype.
        grid_size: rows and columns of patches, rows * columns = N.
        backend: None for the fastest, or "cuda", "triton", "cpu", "torch", "reference".

    Returns:
        ``[B, C, rows * Ph, columns * Pw]``, contiguous, in the tokens' dtype.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value; BackendRefused: ``backend``
            can't run this call.
    """
    tokens, weight, bias = autocast(tokens, weight, bias)
    _check(tokens, weight, bias, grid_size)
    args = PatchUnembedArguments(
        tokens.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        *grid_size,
    )
    return OP(args, backend)
