"""Layer normalisation, as ``torch.nn.functional.layer_norm`` over the last dimension.

``(input - mean) / sqrt(var + eps) * weight + bias``. Shapes: input ``[..., E]``, weight and bias
``[E]``; the result in the input's dtype, contiguous. Arithmetic in float32. The backward saves the
input and every row's mean and reciprocal deviation. Its kernel is for the CPU, where it is that of
`add_layer_norm` without the sum; elsewhere stock PyTorch's is as fast as memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference, stock
from ..registry import Op
from ._checks import FLOATS, check_float, check_shape, check_tensors, describe, is_like
from ._refusals import NOT_ON_CPU, float64_of


class LayerNormArguments(NamedTuple):
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class LayerNormBackwardArguments(NamedTuple):
    grad_out: Tensor
    input: Tensor
    weight: Tensor | None
    mean: Tensor
    rstd: Tensor


SCHEMA = (
    "(Tensor input, Tensor? weight, Tensor? bias, float eps) -> "
    "(Tensor out, Tensor mean, Tensor rstd)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor input, Tensor? weight, Tensor mean, Tensor rstd) -> "
    "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)


def _fake(input, weight, bias, eps):
    rows = input.numel() // input.shape[-1]
    statistics = [
        input.new_empty((rows,), dtype=reference.arithmetic_dtype(input.dtype)) for _ in range(2)
    ]
    return input.new_empty(input.shape), *statistics


def _backward_fake(grad_out, input, weight, mean, rstd):
    like = input if weight is None else weight
    width = input.shape[-1]
    return input.new_empty(input.shape), like.new_empty(width), like.new_empty(width)


def _save(ctx, inputs, output):
    input, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(input, weight, mean, rstd)


def _backward(ctx, grad_out, _, __):
    input, weight, mean, rstd = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(input)
    grad_input, grad_weight, grad_bias = OP.run_backward(ctx, grad_out, input, weight, mean, rstd)
    return (
        grad_input,
        grad_weight if ctx.needs_input_grad[1] else None,
        grad_bias if ctx.needs_input_grad[2] else None,
        None,
    )


def _flops(*args, **kwargs) -> int:
    """Nothing: torch's own counter counts products only."""
    return 0


OP = Op(
    "layer_norm",
    SCHEMA,
    BACKWARD_SCHEMA,
    LayerNormBackwardArguments,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
    reference=reference.layer_norm,
    reference_backward=reference.layer_norm_backward,
    flops=_flops,
    backward_flops=_flops,
)


FLOAT64 = float64_of("input")
OP.add_torch(stock.layer_norm, refuses=(FLOAT64,))
OP.add_native("cpu", refuses=(NOT_ON_CPU, FLOAT64), refuses_backward=(NOT_ON_CPU, FLOAT64))


def _is_usual(input: Any, weight: Any, bias: Any) -> bool:
    """Whether the tensors are right in all that ``_check`` looks at one by one."""
    return (
        isinstance(input, Tensor)
        and input.dim() > 0
        and input.dtype in FLOATS
        and (weight is None or is_like(weight, input.shape[-1:], input.device, FLOATS))
        and (bias is None or is_like(bias, input.shape[-1:], input.device, FLOATS))
    )


def _check(input: Any, weight: Any, bias: Any) -> None:
    if _is_usual(input, weight, bias):
        return
    check_tensors("layer_norm", {"input": input}, weight=weight, bias=bias)
    check_float("layer_norm", input=input, weight=weight, bias=bias)
    if input.dim() == 0:
        raise ValueError(f"layer_norm: expected input of shape [..., E]; got {describe(input)}")
    for name, x in (("weight", weight), ("bias", bias)):
        check_shape("layer_norm", name, x, (input.shape[-1],))


def layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Normalise the last dimension.

    Args:
        input: ``[..., E]`` in float32, bfloat16, float16 (float64: reference only).
        weight: ``[E]`` in the input's dtype or float32, or None.
        bias: as weight.
        eps: added to the variance before its root.
        backend: None for the fastest, or "cpu", "torch", "reference".

    Returns:
        ``[..., E]``, contiguous, in the input's dtype.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; BackendRefused: ``backend`` can't
            run this call.
    """
    _check(input, weight, bias)
    args = LayerNormArguments(
        input.contiguous(),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        float(eps),
    )
    out, _, _ = OP(args, backend)
    return out
