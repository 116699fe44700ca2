"""A linear layer with its neighbours: ``activation(input @ weight.T + bias) + residual``.

Shapes: input ``[..., K]``, weight ``[N, K]``, bias ``[N]``, residual broadcastable to ``[...,
N]``; the result in the input's dtype, contiguous. Sums in float32. The backward saves input,
weight, and, where there is an activation, what the activation was given; the residual's gradient
is the output's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference, stock
from ..registry import Op
from ._checks import (
    FLOATS,
    autocast,
    check_float,
    check_same_dtype,
    check_shape,
    check_tensors,
    describe,
)
from ._refusals import NOT_ON_CPU, float64_of


class LinearArguments(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str
    residual: Tensor | None
    save_preactivation: bool


class LinearBackwardArguments(NamedTuple):
    grad_out: Tensor
    input: Tensor
    weight: Tensor
    preactivation: Tensor
    activation: str
    input_grad: bool
    weight_grad: bool
    bias_grad: bool


SCHEMA = (
    "(Tensor input, Tensor weight, Tensor? bias, str activation, Tensor? residual, "
    "bool save_preactivation) -> (Tensor out, Tensor preactivation)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor input, Tensor weight, Tensor preactivation, str activation, "
    "bool input_grad, bool weight_grad, bool bias_grad) -> "
    "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)


def _fake(input, weight, bias, activation, residual, save_preactivation):
    shape = (*input.shape[:-1], weight.shape[0])
    return input.new_empty(shape), input.new_empty(shape if save_preactivation else 0)


def _backward_fake(
    grad_out, input, weight, preactivation, activation, input_grad, weight_grad, bias_grad
):
    return (
        input.new_empty(input.shape if input_grad else 0),
        weight.new_empty(weight.shape if weight_grad else 0),
        weight.new_empty(weight.shape[0] if bias_grad else 0),
    )


def _save(ctx, inputs, output):
    input, weight, _, ctx.activation, _, _ = inputs
    _, preactivation = output
    ctx.mark_non_differentiable(preactivation)
    ctx.save_for_backward(input, weight, preactivation)


def _backward(ctx, grad_out, _):
    input, weight, preactivation = ctx.saved_tensors
    needed = ctx.needs_input_grad
    if not any(needed[:3]):  # the residual alone: nothing was saved for the rest
        return None, None, None, None, grad_out, None
    grads = OP.run_backward(
        ctx, grad_out, input, weight, preactivation, ctx.activation, *needed[:3]
    )
    kept = [grad if need else None for grad, need in zip(grads, needed[:3], strict=True)]
    return (*kept, None, grad_out if needed[4] else None, None)


def _flops(input_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * math.prod(input_shape) * weight_shape[0]


def _backward_flops(
    grad_shape, input_shape, weight_shape, pre, activation, input_grad, weight_grad, *rest, **kwargs
) -> int:
    return _flops(input_shape, weight_shape) * (int(input_grad) + int(weight_grad))


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# Where torch's product on the CPU is faster, on a Zen 5 core: in float32 only (CONTRIBUTING.md).
# With gradients wanted, of one row, which took it 0.6 to 0.84 of our time, and in small layers,
# 0.65 to 1 of it; the others 1.0 to 3.5 times it.
LEAST_TO_LEARN = 1 << 20  # multiplications
# Without AVX2: of 16 rows torch, held to SSE, took 0.7 of our time, of 64 and more half.
MOST_ROWS_OF_BASELINE = 8


@torch.compiler.assume_constant_result
def _is_baseline() -> bool:
    return _native.is_baseline()


def _is_torchs(input: Tensor, weight: Tensor, learns: bool) -> bool:
    """Whether torch's product on the CPU is faster; `learns`: gradients are wanted."""
    if input.dtype != torch.float32:
        return False
    rows = math.prod(input.shape[:-1])
    if learns and (rows == 1 or rows * weight.numel() < LEAST_TO_LEARN):
        return True
    return rows > MOST_ROWS_OF_BASELINE and _is_baseline()


def _prefer(args: LinearArguments) -> str | None:
    if args.input.device.type != "cpu":
        return None
    learns = _needs_grad(args.input, args.weight)
    return "torch" if _is_torchs(args.input, args.weight, learns) else None


OP = Op(
    "linear",
    SCHEMA,
    BACKWARD_SCHEMA,
    LinearBackwardArguments,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
    reference=reference.linear,
    reference_backward=reference.linear_backward,
    flops=_flops,
    backward_flops=_backward_flops,
    prefer=_prefer,
)
FLOAT64 = float64_of("input")
OP.add_torch(stock.linear, refuses=(FLOAT64,))
OP.add_native("cpu", refuses=(NOT_ON_CPU, FLOAT64), refuses_backward=(NOT_ON_CPU, FLOAT64))
# No kernel for GPUs: cuBLASLt has bias, ReLU and GELU in its epilogue, and a product of ours would
# have to beat its product first.


def _is_usual(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether the tensors are right in all that ``_check_tensors`` looks at one by one, which takes
    three times as long, and the residual, if any, has the output's shape already.
    """
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor):
        return False
    shape, dtype, device = input.shape, input.dtype, input.device
    if not shape or weight.dim() != 2 or dtype not in FLOATS:
        return False
    outer = weight.shape[0]
    wanted = ((weight, (outer, shape[-1])), (bias, (outer,)), (residual, (*shape[:-1], outer)))
    for x, its_shape in wanted:
        if x is not None and not (
            isinstance(x, Tensor)
            and x.shape == its_shape
            and x.dtype == dtype
            and x.device == device
        ):
            return False
    return True


def _check_tensors(input: Tensor, weight: Tensor, **others: Any) -> None:
    check_tensors("linear", {"input": input, "weight": weight}, **others)
    check_float("linear", input=input)
    check_same_dtype("linear", input.dtype, "input", weight=weight, **others)
    if input.dim() == 0:
        raise ValueError(f"linear: expected input of shape [..., K]; got {describe(input)}")
    check_shape("linear", "weight", weight, (None, input.shape[-1]))
    check_shape("linear", "bias", others["bias"], (weight.shape[0],))
    residual = others["residual"]
    full = (*input.shape[:-1], weight.shape[0])
    if residual is not None and (
        residual.dim() > len(full)
        or any(
            have not in (1, n) for have, n in zip(residual.shape[::-1], full[::-1], strict=False)
        )
    ):
        raise ValueError(
            f"linear: expected residual broadcastable to {list(full)}; got {describe(residual)}"
        )


def _check_activation(activation: str) -> None:
    if activation not in reference.ACTIVATIONS:
        names = ", ".join(repr(name) for name in reference.ACTIVATIONS if name != "none")
        raise ValueError(f"linear: expected activation to be None, {names}; got {activation!r}")


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``activation(input @ weight.T + bias) + residual``.

    Args:
        input: ``[..., K]`` in float32, bfloat16, float16 (float64: reference only).
        weight: ``[N, K]`` in the input's dtype, as of ``nn.Linear``.
        bias: ``[N]`` in the input's dtype.
        activation: None, "relu", "gelu" (the exact one, by erf), "gelu_tanh" or "silu".
        residual: broadcastable to ``[..., N]``, in the input's dtype, added after the activation.
        backend: None for the fastest, or "cuda", "triton", "cpu", "torch", "reference".

    Returns:
        ``[..., N]``, contiguous, in the input's dtype.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value; BackendRefused: ``backend``
            can't run this call.
    """
    name = activation or "none"
    _check_activation(name)
    if (
        backend is None
        and OP.takes_cpu_kernel(input)
        and not _is_torchs(input, weight, learns=False)
        and _is_usual(input, weight, bias, residual)
    ):
        return OP.run(LinearArguments(input, weight, bias, name, residual, False), "cpu")[0]
    input, weight, bias, residual = autocast(input, weight, bias, residual)
    if not _is_usual(input, weight, bias, residual):
        _check_tensors(input, weight, bias=bias, residual=residual)
        if residual is not None:
            residual = residual.expand(*input.shape[:-1], weight.shape[0])
    keeps = activation is not None and _needs_grad(input, weight, bias)
    args = LinearArguments(input, weight, bias, name, residual, keeps)
    return OP(args, backend)[0]
