"""Normalisation of queries and keys over D, then rotary embedding, in one pass instead of five.

``y = norm(x) * weight + bias``, norm being "rms", "layer" or none, then for all but the prefix
tokens ``y * cos + turn(y) * sin``, where turn takes every pair (a, b) to (-b, a). Pairs are the
two halves of D, or with ``interleaved`` its neighbours (0, 1), (2, 3), ... (Su et al. 2021,
RoFormer; in two dimensions the tables hold the row's angles and the column's).

Shapes: query ``[B, H, N, D]``, key ``[B, Hkv, N, D]``, any strides; results in the input's dtype,
in memory ``[B, N, H, D]``. Arithmetic in float32. Gradients for all tensors, cos and sin
included; the backward saves the inputs and computes the normalisation again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference, stock, triton
from ..registry import Op
from ._checks import (
    FLOATS,
    check_float,
    check_same_dtype,
    check_shape,
    check_tensors,
    describe,
    inner_contiguous,
    is_like,
)
from ._refusals import NOT_FOR_TRITON, NOT_ON_CPU, float64_of

NORMS = (None, "rms", "layer")


class QkNormRopeArguments(NamedTuple):
    query: Tensor
    key: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    q_bias: Tensor | None
    k_bias: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    norm: str
    eps: float
    interleaved: bool
    num_prefix_tokens: int


class QkNormRopeBackwardArguments(NamedTuple):
    grad_query: Tensor
    grad_key: Tensor
    query: Tensor
    key: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    q_bias: Tensor | None
    k_bias: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    norm: str
    eps: float
    interleaved: bool
    num_prefix_tokens: int
    cos_sin_grad: bool


_INPUTS = (
    "Tensor query, Tensor key, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, "
    "Tensor? cos, Tensor? sin, str norm, float eps, bool interleaved, int num_prefix_tokens"
)
SCHEMA = f"({_INPUTS}) -> (Tensor query_out, Tensor key_out)"
BACKWARD_SCHEMA = (
    f"(Tensor grad_query, Tensor grad_key, {_INPUTS}, bool cos_sin_grad) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _rows_like(x: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return x.new_empty((batch, tokens, heads, dim)).transpose(1, 2)


def _fake(query, key, *rest):
    return _rows_like(query), _rows_like(key)


def _like(x: Tensor | None, wanted: bool, query: Tensor) -> Tensor:
    if x is None or not wanted:
        return query.new_empty(0)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _backward_fake(grad_query, grad_key, query, key, *rest):
    *tensors, cos, sin = rest[:6]
    wanted = rest[-1] and cos is not None
    return (
        _rows_like(query),
        _rows_like(key),
        *(_like(x, True, query) for x in tensors),
        _like(cos, wanted, query),
        _like(sin, wanted, query),
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _backward(ctx, grad_query, grad_key):
    query, key, *rest = ctx.saved_tensors
    grad_query = torch.zeros_like(query) if grad_query is None else grad_query
    grad_key = torch.zeros_like(key) if grad_key is None else grad_key
    cos_sin_grad = ctx.needs_input_grad[6] or ctx.needs_input_grad[7]
    grads = OP.run_backward(
        ctx, grad_query, grad_key, query, key, *rest, *ctx.options, cos_sin_grad
    )
    needed = [
        grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:8], strict=True)
    ]
    return (*needed, None, None, None, None)


def _flops(*args, **kwargs) -> int:
    """Nothing: torch's own counter counts products only."""
    return 0


OP = Op(
    "qk_norm_rope",
    SCHEMA,
    BACKWARD_SCHEMA,
    QkNormRopeBackwardArguments,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
    reference=reference.qk_norm_rope,
    reference_backward=reference.qk_norm_rope_backward,
    flops=_flops,
    backward_flops=_flops,
)
FLOAT64 = float64_of("query")
OP.add_torch(stock.qk_norm_rope, refuses=(FLOAT64,))
OP.add_native("cpu", refuses=(NOT_ON_CPU, FLOAT64), refuses_backward=(NOT_ON_CPU, FLOAT64))
OP.add_kernels(
    "triton",
    "patchgen_fast.triton.qk_norm_rope:qk_norm_rope",
    "patchgen_fast.triton.qk_norm_rope:qk_norm_rope_backward",
    refuses=(NOT_FOR_TRITON, FLOAT64),
    refuses_backward=(NOT_FOR_TRITON, FLOAT64),
    unavailable=triton.unavailable_reason(),
)


def _is_usual(query: Tensor, key: Tensor, norm: str | None, weights: dict[str, Any]) -> bool:
    """Whether the call is right in all that ``_check`` looks at one by one."""
    if not isinstance(query, Tensor) or not isinstance(key, Tensor):
        return False
    shape, key_shape, device = query.shape, key.shape, query.device
    if not (
        len(shape) == len(key_shape) == 4
        and key_shape[0] == shape[0]
        and key_shape[2:] == shape[2:]
        and query.dtype == key.dtype
        and query.dtype in FLOATS
        and key.device == device
        and norm in NORMS
    ):
        return False
    width = shape[3:]
    for x in weights.values():
        if x is not None and (norm is None or not is_like(x, width, device, FLOATS)):
            return False
    return True


def _check(query: Tensor, key: Tensor, norm: str | None, weights: dict[str, Any]) -> None:
    check_tensors("qk_norm_rope", {"query": query, "key": key}, **weights)
    check_shape("qk_norm_rope", "query", query, (None, None, None, None))
    batch, _, tokens, dim = query.shape
    check_shape("qk_norm_rope", "key", key, (batch, None, tokens, dim))
    check_float("qk_norm_rope", query=query, **weights)
    check_same_dtype("qk_norm_rope", query.dtype, "query", key=key)
    if norm not in NORMS:
        raise ValueError(f'qk_norm_rope: expected norm to be None, "rms" or "layer"; got {norm!r}')
    for name, x in weights.items():
        check_shape("qk_norm_rope", name, x, (dim,))
        if x is not None and norm is None:
            raise ValueError(
                f'qk_norm_rope: expected norm="rms" or "layer" with {name}; got norm=None'
            )


def _are_usual(cos: Any, sin: Any, query: Tensor, rotated: int) -> bool:
    """Whether the tables, of one head and of ``rotated`` tokens, are right in all that
    ``_check_tables`` looks at one by one.
    """
    if not isinstance(cos, Tensor):
        return False
    batch, _, _, dim = query.shape
    shape, device = cos.shape, query.device
    return (
        (shape == (1, 1, rotated, dim) or shape == (batch, 1, rotated, dim))
        and cos.dtype in FLOATS
        and cos.device == device
        and is_like(sin, shape, device, FLOATS)
        and dim % 2 == 0
    )


def _check_tables(
    query: Tensor, key: Tensor, cos_sin: tuple[Tensor, Tensor] | None, prefix: int
) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin in four dimensions, of one shape."""
    batch, heads, tokens, dim = query.shape
    if not 0 <= prefix <= tokens:
        raise ValueError(
            f"qk_norm_rope: expected num_prefix_tokens from 0 to the {tokens} tokens; got {prefix}"
        )
    if cos_sin is None:
        return None, None
    if not isinstance(cos_sin, (tuple, list)) or len(cos_sin) != 2:
        raise TypeError(
            f"qk_norm_rope: expected cos_sin as a pair of tensors; got {type(cos_sin).__name__}"
        )
    cos, sin = cos_sin
    if _are_usual(cos, sin, query, tokens - prefix):
        return inner_contiguous(cos), inner_contiguous(sin)
    check_tensors("qk_norm_rope", {"query": query, "cos": cos, "sin": sin})
    check_float("qk_norm_rope", cos=cos, sin=sin)
    if dim % 2:
        raise ValueError(f"qk_norm_rope: expected an even D to rotate in pairs; got {dim}")
    full = (batch, heads, tokens - prefix, dim)
    for name, x in (("cos", cos), ("sin", sin)):
        if not 2 <= x.dim() <= 4 or any(
            have not in (1, want) for have, want in zip(x.shape[::-1], full[::-1], strict=False)
        ):
            raise ValueError(
                f"qk_norm_rope: expected {name} broadcastable to [B, H or 1, N - prefix, D] = "
                f"{list(full)}; got {describe(x)}"
            )
        if x.dim() == 4 and x.shape[1] != 1 and key.shape[1] != heads:
            raise ValueError(
                f"qk_norm_rope: expected {name} with one head where key has other heads than "
                f"query; got {describe(x)} for {heads} and {key.shape[1]} heads"
            )
    if cos.dim() < 4 or sin.dim() < 4:
        cos, sin = (x[(None,) * (4 - x.dim())] for x in (cos, sin))
    if cos.shape == sin.shape and cos.shape[2:] == full[2:]:
        return inner_contiguous(cos), inner_contiguous(sin)
    shape = torch.broadcast_shapes(cos.shape, sin.shape, (1, 1, *full[2:]))
    return inner_contiguous(cos.expand(shape)), inner_contiguous(sin.expand(shape))


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    *,
    norm: str | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 1e-6,
    cos_sin: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    num_prefix_tokens: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys over D, then rotate all but the prefix tokens.

    Args:
        query: ``[B, H, N, D]`` in float32, bfloat16, float16 (float64: reference only), any
            strides.
        key: ``[B, Hkv, N, D]`` in the query's dtype.
        norm: None, "rms" or "layer".
        q_weight, k_weight, q_bias, k_bias: ``[D]`` in any floating dtype, or None.
        eps: added to the mean square before its root.
        cos_sin: a pair, each broadcastable to ``[B, H or 1, N - num_prefix_tokens, D]``; other
            than one head only where key has as many heads as query.
        interleaved: rotate pairs (0, 1), (2, 3), ...; otherwise the two halves of D.
        num_prefix_tokens: tokens at the front (class, registers) that are normalised and not
            rotated.
        backend: None for the fastest, or "cuda", "triton", "cpu", "torch", "reference".

    Returns:
        query and key, in their dtype, in memory ``[B, N, H, D]``.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value; BackendRefused: ``backend``
            can't run this call.
    """
    weights = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    if not _is_usual(query, key, norm, weights):
        _check(query, key, norm, weights)
    cos, sin = _check_tables(query, key, cos_sin, num_prefix_tokens)
    args = QkNormRopeArguments(
        inner_contiguous(query),
        inner_contiguous(key),
        None if q_weight is None else q_weight.contiguous(),
        None if k_weight is None else k_weight.contiguous(),
        None if q_bias is None else q_bias.contiguous(),
        None if k_bias is None else k_bias.contiguous(),
        cos,
        sin,
        norm or "none",
        float(eps),
        bool(interleaved),
        num_prefix_tokens,
    )
    return OP(args, backend)
