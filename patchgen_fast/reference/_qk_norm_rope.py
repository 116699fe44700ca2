"""Normalisation of queries and keys with rotary embedding: forward and explicit backward."""

import torch
from torch import Tensor

from ._arithmetic import arithmetic_dtype, nothing


def rotate(x: Tensor, interleaved: bool) -> Tensor:
    """The quarter turn of every pair: (a, b) to (-b, a)."""
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((-b, a), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def _normalise(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """Normalised over the last dimension, without weights, and the reciprocal deviation."""
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def _norm_rope(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
    num_prefix_tokens: int,
    work: torch.dtype,
) -> Tensor:
    y = x.to(work)
    if norm != "none":
        y, _ = _normalise(y, norm, eps)
    if weight is not None:
        y = y * weight.to(work)
    if bias is not None:
        y = y + bias.to(work)
    if cos is not None and sin is not None:
        prefix, rest = y[:, :, :num_prefix_tokens], y[:, :, num_prefix_tokens:]
        rest = rest * cos.to(work) + rotate(rest, interleaved) * sin.to(work)
        y = torch.cat((prefix, rest), dim=2)
    return y.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm: str = "none",
    eps: float = 1e-6,
    interleaved: bool = False,
    num_prefix_tokens: int = 0,
    *,
    arithmetic: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """RMS or layer normalisation over D, then rotary embedding of all but the prefix tokens.

    Rotary embedding: Su et al. 2021, "RoFormer".
    """
    work = arithmetic or arithmetic_dtype(query.dtype)
    rest = (cos, sin, norm, eps, interleaved, num_prefix_tokens, work)
    return _norm_rope(query, q_weight, q_bias, *rest), _norm_rope(key, k_weight, k_bias, *rest)


def _norm_rope_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
    num_prefix_tokens: int,
    cos_sin_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias, and this tensor's share of those of cos and sin."""
    work = arithmetic_dtype(x.dtype)
    grad = grad.to(work)
    normed, rstd = x.to(work), None
    if norm != "none":
        normed, rstd = _normalise(normed, norm, eps)
    affine = normed if weight is None else normed * weight.to(work)
    if bias is not None:
        affine = affine + bias.to(work)
    grad_cos = grad_sin = None
    if cos is not None and sin is not None:
        prefix, turned = grad[:, :, :num_prefix_tokens], grad[:, :, num_prefix_tokens:]
        if cos_sin_grad:
            rest = affine[:, :, num_prefix_tokens:]
            grad_cos = (turned * rest).sum_to_size(cos.shape)
            grad_sin = (turned * rotate(rest, interleaved)).sum_to_size(sin.shape)
        turned = turned * cos.to(work) - rotate(turned * sin.to(work), interleaved)
        grad = torch.cat((prefix, turned), dim=2)
    grad_bias = nothing(x) if bias is None else grad.sum((0, 1, 2)).to(bias.dtype)
    grad_weight = nothing(x) if weight is None else (grad * normed).sum((0, 1, 2)).to(weight.dtype)
    if weight is not None:
        grad = grad * weight.to(work)
    if rstd is not None:
        centred = grad - normed * (grad * normed).mean(-1, keepdim=True)
        if norm == "layer":
            centred = centred - grad.mean(-1, keepdim=True)
        grad = centred * rstd
    grad_x = grad.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return grad_x, grad_weight, grad_bias, grad_cos, grad_sin


def qk_norm_rope_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    query: Tensor,
    key: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
    num_prefix_tokens: int,
    cos_sin_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, the four weights and biases, cos and sin.

    Size 0 where there is none to give.
    """
    rest = (cos, sin, norm, eps, interleaved, num_prefix_tokens, cos_sin_grad)
    q_grad, q_w, q_b, q_cos, q_sin = _norm_rope_backward(grad_query, query, q_weight, q_bias, *rest)
    k_grad, k_w, k_b, k_cos, k_sin = _norm_rope_backward(grad_key, key, k_weight, k_bias, *rest)
    if (
        cos is None
        or sin is None
        or q_cos is None
        or k_cos is None
        or q_sin is None
        or k_sin is None
    ):
        return q_grad, k_grad, q_w, k_w, q_b, k_b, nothing(query), nothing(query)
    return (
        q_grad,
        k_grad,
        q_w,
        k_w,
        q_b,
        k_b,
        (q_cos + k_cos).to(cos.dtype),
        (q_sin + k_sin).to(sin.dtype),
    )
