"""The residual sum of a block and its layer normalisation, in one pass.

``sum = input + residual``, rounded to its dtype, and ``(sum - mean) / sqrt(var + eps) * weight +
bias`` over the last dimension. Shapes: input and residual alike ``[..., E]``, weight and bias
``[E]``; both results in the input's dtype, contiguous. Arithmetic in float32. The backward saves
the sum and every row's mean and reciprocal deviation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference, stock, triton
from ..registry import Op
from ._checks import FLOATS, check_float, check_same_dtype, check_shape, check_tensors, is_like
from ._refusals import NOT_FOR_TRITON, NOT_ON_CPU, features_above, float64_of


class AddLayerNormArguments(NamedTuple):
    input: Tensor
    residual: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class AddLayerNormBackwardArguments(NamedTuple):
    grad_normalised: Tensor
    grad_sum: Tensor | None
    sum: Tensor
    weight: Tensor | None
    mean: Tensor
    rstd: Tensor


SCHEMA = (
    "(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> "
    "(Tensor normalised, Tensor sum, Tensor mean, Tensor rstd)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_normalised, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor mean, "
    "Tensor rstd) -> (Tensor grad_total, Tensor grad_weight, Tensor grad_bias)"
)


def _fake(input, residual, weight, bias, eps):
    rows = input.numel() // input.shape[-1]
    statistics = [
        input.new_empty((rows,), dtype=reference.arithmetic_dtype(input.dtype)) for _ in range(2)
    ]
    return input.new_empty(input.shape), input.new_empty(input.shape), *statistics


def _backward_fake(grad_normalised, grad_sum, sum, weight, mean, rstd):
    like = sum if weight is None else weight
    width = sum.shape[-1]
    return sum.new_empty(sum.shape), like.new_empty(width), like.new_empty(width)


def _save(ctx, inputs, output):
    _, _, weight, _, _ = inputs
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(total, weight, mean, rstd)


def _backward(ctx, grad_normalised, grad_sum, _, __):
    total, weight, mean, rstd = ctx.saved_tensors
    if grad_normalised is None:
        grad_normalised = torch.zeros_like(total)
    grad_total, grad_weight, grad_bias = OP.run_backward(
        ctx, grad_normalised, grad_sum, total, weight, mean, rstd
    )
    return (
        grad_total,
        grad_total,
        grad_weight if ctx.needs_input_grad[2] else None,
        grad_bias if ctx.needs_input_grad[3] else None,
        None,
    )


def _flops(*args, **kwargs) -> int:
    """Nothing: torch's own counter counts products only."""
    return 0


OP = Op(
    "add_layer_norm",
    SCHEMA,
    BACKWARD_SCHEMA,
    AddLayerNormBackwardArguments,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
    reference=reference.add_layer_norm,
    reference_backward=reference.add_layer_norm_backward,
    flops=_flops,
    backward_flops=_flops,
)


FLOAT64 = float64_of("input")
BACKWARD_FLOAT64 = float64_of("sum")
WIDE_FOR_TRITON = features_above(16384, "input")
BACKWARD_WIDE_FOR_TRITON = features_above(16384, "sum")
OP.add_torch(stock.add_layer_norm, refuses=(FLOAT64,))
OP.add_native("cpu", refuses=(NOT_ON_CPU, FLOAT64), refuses_backward=(NOT_ON_CPU, BACKWARD_FLOAT64))
OP.add_kernels(
    "triton",
    "patchgen_fast.triton.add_layer_norm:add_layer_norm",
    "patchgen_fast.triton.add_layer_norm:add_layer_norm_backward",
    refuses=(NOT_FOR_TRITON, FLOAT64, WIDE_FOR_TRITON),
    refuses_backward=(NOT_FOR_TRITON, BACKWARD_FLOAT64, BACKWARD_WIDE_FOR_TRITON),
    unavailable=triton.unavailable_reason(),
)


def _is_usual(input: Any, residual: Any, weight: Any, bias: Any) -> bool:
    """Whether the tensors are right in all that ``_check`` looks at one by one."""
    if not isinstance(input, Tensor):
        return False
    shape, device = input.shape, input.device
    return (
        len(shape) > 0
        and input.dtype in FLOATS
        and is_like(residual, shape, device, (input.dtype,))
        and (weight is None or is_like(weight, shape[-1:], device, FLOATS))
        and (bias is None or is_like(bias, shape[-1:], device, FLOATS))
    )


def _check(input: Any, residual: Any, weight: Any, bias: Any) -> None:
    if _is_usual(input, residual, weight, bias):
        return
    inputs = {"input": input, "residual": residual}
    check_tensors("add_layer_norm", inputs, weight=weight, bias=bias)
    check_float("add_layer_norm", input=input, weight=weight, bias=bias)
    check_same_dtype("add_layer_norm", input.dtype, "input", residual=residual)
    check_shape("add_layer_norm", "residual", residual, tuple(input.shape))
    for name, x in (("weight", weight), ("bias", bias)):
        check_shape("add_layer_norm", name, x, (input.shape[-1],))


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a block's residual, and normalise the sum for the next.

    Args:
        input: ``[..., E]`` in float32, bfloat16, float16 (float64: reference only).
        residual: of the same shape and dtype.
        weight: ``[E]`` in the input's dtype or float32, or None.
        bias: as weight.
        eps: added to the variance before its root.
        backend: None for the fastest, or "cuda", "triton", "cpu", "torch", "reference".

    Returns:
        The normalised sum and the sum, each ``[..., E]``, contiguous, in the input's dtype.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; BackendRefused: ``backend`` can't
            run this call.
    """
    _check(input, residual, weight, bias)
    args = AddLayerNormArguments(
        input.contiguous(),
        residual.contiguous(),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        float(eps),
    )
    normalised, total, _, _ = OP(args, backend)
    return normalised, total
