"""linear, layer_norm and add_layer_norm: forward and explicit backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arithmetic import arithmetic_dtype, nothing

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    save_preactivation: bool = False,
    *,
    arithmetic: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``activation(input @ weight.T + bias) + residual``, and what the activation was given."""
    work = arithmetic or arithmetic_dtype(input.dtype)
    pre = input.to(work) @ weight.to(work).mT
    if bias is not None:
        pre = pre + bias.to(work)
    out = ACTIVATIONS[activation](pre)
    if residual is not None:
        out = out + residual.to(work)
    return out.to(input.dtype), pre.to(input.dtype) if save_preactivation else nothing(input)


def activation_backward(grad: Tensor, preactivation: Tensor, activation: str) -> Tensor:
    """The gradient of what the activation was given; both in the dtype of the arithmetic."""
    aten = torch.ops.aten
    if activation == "none":
        return grad
    if activation == "relu":
        return grad * (preactivation > 0)
    if activation == "silu":
        return aten.silu_backward(grad, preactivation)
    return aten.gelu_backward(
        grad, preactivation, approximate="tanh" if activation == "gelu_tanh" else "none"
    )


def linear_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor,
    preactivation: Tensor,
    activation: str,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; the residual's is ``grad_out`` itself."""
    work = arithmetic_dtype(input.dtype)
    grad = activation_backward(grad_out.to(work), preactivation.to(work), activation)
    rows = grad.reshape(-1, weight.shape[0])
    grad_input = grad_weight = grad_bias = nothing(input)
    if input_grad:
        grad_input = (grad @ weight.to(work)).to(input.dtype)
    if weight_grad:
        grad_weight = (rows.mT @ input.to(work).reshape(-1, weight.shape[1])).to(weight.dtype)
    if bias_grad:
        grad_bias = rows.sum(0).to(weight.dtype)
    return grad_input, grad_weight, grad_bias


def layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    arithmetic: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer normalisation, and every row's mean and reciprocal deviation."""
    work = arithmetic or arithmetic_dtype(input.dtype)
    return _layer_norm(input.to(work), weight, bias, eps, input.dtype)


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype of x; the results for an input of `dtype`."""
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normalised = centred * rstd
    if weight is not None:
        normalised = normalised * weight.to(x.dtype)
    if bias is not None:
        normalised = normalised + bias.to(x.dtype)
    statistics = arithmetic_dtype(dtype)
    return (
        normalised.to(dtype),
        mean.flatten().to(statistics),
        rstd.flatten().to(statistics),
    )


def layer_norm_backward(
    grad_out: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias."""
    return add_layer_norm_backward(grad_out, None, input, weight, mean, rstd)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    arithmetic: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum's layer normalisation, the sum, and every row's mean and reciprocal deviation.

    The sum is rounded to its dtype before it is normalised.
    """
    work = arithmetic or arithmetic_dtype(input.dtype)
    total = input.to(work) + residual.to(work)
    if arithmetic != torch.float64:
        total = total.to(input.dtype).to(work)
    normalised, mean, rstd = _layer_norm(total, weight, bias, eps, input.dtype)
    return normalised, total.to(input.dtype), mean, rstd


def add_layer_norm_backward(
    grad_normalised: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the sum, which input and residual share, and those of weight and bias."""
    work = arithmetic_dtype(sum.dtype)
    shape = (*sum.shape[:-1], 1)
    grad = grad_normalised.to(work)
    normed = (sum.to(work) - mean.view(shape)) * rstd.view(shape)
    rows = (-1, sum.shape[-1])
    dtype = sum.dtype if weight is None else weight.dtype
    grad_weight = (grad * normed).reshape(rows).sum(0).to(dtype)
    grad_bias = grad.reshape(rows).sum(0).to(dtype)
    if weight is not None:
        grad = grad * weight.to(work)
    grad = grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True)
    total = grad * rstd.view(shape)
    if grad_sum is not None:
        total = total + grad_sum.to(work)
    return total.to(sum.dtype), grad_weight, grad_bias
