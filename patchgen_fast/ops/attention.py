"""Multi-head attention: ``softmax(scale * query @ key.T + mask) @ value``, with its log-sum-exp.

Shapes: query ``[B, H, Nq, D]``, key and value ``[B, Hkv, Nk, D]`` with H a multiple of Hkv; any
strides, so that the views of a packed qkv projection go in uncopied. The result lies in memory as
``[B, Nq, H, D]``.

Query i sees key j if the mask allows it, and ``j < kv_lengths[b]``, and, when causal, ``j <= i +
query_offset[b]``. A row that sees nothing gives 0, log-sum-exp -inf, and gradients of 0; only
False, -inf, lengths and causality empty a row: finfo.min in an additive mask is a number like any
other.

Arithmetic in float32 (float64 for float64), results in the query's dtype, log-sum-exp in float32.
The backward recomputes the weights from the log-sum-exp (Dao 2023, FlashAttention-2): it saves
query, key, value, out and lse, and gives gradients of query, key, value and an additive mask.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference, stock, triton
from ..dispatch import Refusal
from ..registry import Op
from ..triton import thresholds
from . import _cuda_limits
from ._checks import (
    FLOATS,
    autocast,
    check_float,
    check_heads,
    check_same_dtype,
    check_shape,
    check_tensors,
    describe,
    inner_contiguous,
    is_like,
    is_readable,
)
from ._refusals import NOT_FOR_TRITON, NOT_ON_CPU, float64_of

MAX_HEAD_DIM = 256
COUNTS = (torch.int32, torch.int64)


class AttentionArguments(NamedTuple):
    """The forward's schema, normalised; then what only compositions of stock operators can do."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    kv_lengths: Tensor | None
    query_offset: Tensor | None
    is_causal: bool
    scale: float
    dropout_p: float
    return_lse: bool


class AttentionBackwardArguments(NamedTuple):
    grad_out: Tensor
    grad_lse: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    attn_mask: Tensor | None
    kv_lengths: Tensor | None
    query_offset: Tensor | None
    is_causal: bool
    scale: float
    mask_grad: bool


SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? kv_lengths, "
    "Tensor? query_offset, bool is_causal, float scale) -> (Tensor out, Tensor lse)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor lse, Tensor? attn_mask, Tensor? kv_lengths, Tensor? query_offset, bool is_causal, "
    "float scale, bool mask_grad) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)"
)


def _rows_like(x: Tensor) -> Tensor:
    """Empty, shaped as ``x`` ``[B, H, N, D]``, in memory ``[B, N, H, D]``."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty((batch, tokens, heads, dim)).transpose(1, 2)


def _fake(query, key, value, attn_mask, kv_lengths, query_offset, is_causal, scale):
    lse = query.new_empty(query.shape[:3], dtype=reference.arithmetic_dtype(query.dtype))
    return _rows_like(query), lse


def _backward_fake(grad_out, grad_lse, query, key, value, out, lse, attn_mask, *rest):
    mask_grad = rest[-1]
    grad_mask = (
        query.new_empty(0)
        if not mask_grad
        else torch.empty(attn_mask.shape, dtype=attn_mask.dtype, device=attn_mask.device)
    )
    return _rows_like(query), _rows_like(key), _rows_like(value), grad_mask


def _save(ctx, inputs, output):
    query, key, value, attn_mask, kv_lengths, query_offset, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, attn_mask, kv_lengths, query_offset)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, out, lse, attn_mask, kv_lengths, query_offset = ctx.saved_tensors
    mask_grad = ctx.needs_input_grad[3]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_query, grad_key, grad_value, grad_mask = OP.run_backward(
        ctx,
        grad_out,
        grad_lse,
        query,
        key,
        value,
        out,
        lse,
        attn_mask,
        kv_lengths,
        query_offset,
        ctx.is_causal,
        ctx.scale,
        mask_grad,
    )
    mask = grad_mask if mask_grad else None
    return grad_query, grad_key, grad_value, mask, None, None, None, None


def _flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    """Two products, as torch's own counter counts SDPA: masks and causality take nothing off."""
    batch, heads, rows, dim = query_shape
    return 4 * batch * heads * rows * key_shape[2] * dim


def _backward_flops(grad_shape, grad_lse_shape, query_shape, key_shape, *args, **kwargs) -> int:
    """Five products, the recomputed one included."""
    return _flops(query_shape, key_shape, key_shape) * 5 // 2


DROPOUT = Refusal(
    "dropout", "dropout_p above 0 is done by reference and torch only", lambda a: a.dropout_p > 0
)
FLOAT64 = float64_of("query")
HEAD_DIM = Refusal(
    "head_dim",
    f"head dimensions above {MAX_HEAD_DIM} are done by torch and reference only",
    lambda a: a.query.shape[-1] > MAX_HEAD_DIM,
)

WIDE_MASK_ON_CUDA = Refusal(
    "mask_dtype",
    "SDPA on CUDA takes no float32 mask beside half queries, and rounding it could empty rows",
    lambda a: (
        a.query.device.type == "cuda"
        and a.attn_mask is not None
        and a.attn_mask.dtype not in (torch.bool, a.query.dtype)
    ),
)

OP = Op(
    "attention",
    SCHEMA,
    BACKWARD_SCHEMA,
    AttentionBackwardArguments,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
    reference=reference.attention,
    reference_backward=reference.attention_backward,
    flops=_flops,
    backward_flops=_backward_flops,
    prefer=thresholds.attention,
)
OP.add_torch(stock.attention, refuses=(FLOAT64, WIDE_MASK_ON_CUDA))
OP.add_native(
    "cpu",
    refuses=(NOT_ON_CPU, FLOAT64, HEAD_DIM, DROPOUT),
    refuses_backward=(NOT_ON_CPU, FLOAT64, HEAD_DIM),
)
OP.add_native("cuda", _cuda_limits.ATTENTION, _cuda_limits.ATTENTION_BACKWARD)
OP.add_kernels(
    "triton",
    "patchgen_fast.triton.attention:attention",
    "patchgen_fast.triton.attention_backward:attention_backward",
    refuses=(NOT_FOR_TRITON, FLOAT64, HEAD_DIM, DROPOUT),
    refuses_backward=(NOT_FOR_TRITON, FLOAT64, HEAD_DIM),
    unavailable=triton.unavailable_reason(),
)


def _are_alike(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this is the usual call, right in all that ``_check_shapes`` looks at one by one,
    which takes three times as long.
    """
    if (
        not isinstance(query, Tensor)
        or not isinstance(key, Tensor)
        or not isinstance(value, Tensor)
    ):
        return False
    shape, key_shape = query.shape, key.shape
    return (
        len(shape) == len(key_shape) == 4
        and shape[3] > 0
        and key_shape == value.shape
        and key_shape[:2] == shape[:2]
        and key_shape[3] == shape[3]
        and query.dtype == key.dtype == value.dtype
        and query.dtype in FLOATS
        and query.device == key.device == value.device
    )


def _scale(scale: float | None, query: Tensor) -> float:
    return 1.0 / math.sqrt(query.shape[3]) if scale is None else float(scale)


def _are_usual(query: Tensor, key: Tensor, value: Tensor, query_offset: Any) -> bool:
    """Whether the CPU kernel takes the three as they are, from position 0."""
    return (
        _are_alike(query, key, value)
        and isinstance(query_offset, int)
        and query_offset == 0
        and query.shape[3] <= MAX_HEAD_DIM
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
    )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    if _are_alike(query, key, value):
        return
    inputs = {"query": query, "key": key, "value": value}
    check_tensors("attention", inputs)
    for name, x in inputs.items():
        if x.dim() != 4:
            raise ValueError(
                f"attention: expected {name} of shape [B, H, N, D]; got {describe(x)}. "
                "Add the missing dimensions with .unsqueeze, or use varlen_attention for packed "
                "[T, H, D]"
            )
    check_float("attention", query=query)
    check_same_dtype("attention", query.dtype, "query", key=key, value=value)
    batch, heads, _, dim = query.shape
    check_shape("attention", "key", key, (batch, None, None, dim))
    check_shape("attention", "value", value, tuple(key.shape))
    if dim == 0:
        raise ValueError(
            f"attention: expected a head dimension of at least 1; got {describe(query)}"
        )
    check_heads("attention", heads, key.shape[1], enable_gqa)


def _normalise_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask in four dimensions, each full or 1."""
    if mask is None:
        return None
    check_tensors("attention", {"query": query, "attn_mask": mask})
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"attention: expected attn_mask in bool (True attends), float32 or {query.dtype}; "
            f"got {describe(mask)}"
        )
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if not 2 <= mask.dim() <= 4 or any(
        have not in (1, want) for have, want in zip(mask.shape[::-1], full[::-1], strict=False)
    ):
        raise ValueError(
            f"attention: expected attn_mask of 2 to 4 dimensions, broadcastable to {list(full)}; "
            f"got {describe(mask)}"
        )
    return mask if mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]


def _normalise_counts(
    name: str, counts: Any, query: Tensor, low: int | None, high: int
) -> Tensor | None:
    """An int or integer tensor ``[B]`` as int32 ``[B]`` on the query's device; its values checked
    on the CPU.
    """
    if counts is None:
        return None
    batch = query.shape[0]
    if isinstance(counts, (int, torch.SymInt)):
        # SymInt: an offset that a traced graph leaves open.
        return torch.full(
            (batch,),
            counts,  # type: ignore[arg-type]
            dtype=torch.int32,
            device=query.device,
        )
    if not is_like(counts, (batch,), query.device, COUNTS):
        check_tensors("attention", {"query": query, name: counts})
        if counts.dtype not in COUNTS:
            raise TypeError(f"attention: expected {name} in int32 or int64; got {describe(counts)}")
        check_shape("attention", name, counts, (batch,))
    if low is not None and batch and is_readable(counts):
        values = counts.tolist()  # two reductions of a tensor take ten times as long
        least, most = min(values), max(values)
        if least < low or most > high:
            raise ValueError(
                f"attention: expected every value of {name} from {low} to {high}; "
                f"got {least} to {most}"
            )
    return (counts if counts.dtype == torch.int32 else counts.to(torch.int32)).contiguous()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    kv_lengths: Tensor | None = None,
    query_offset: int | Tensor = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention, with the signature and meaning of
    ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: ``[B, H, Nq, D]`` in float32, bfloat16, float16 (float64: reference only); any
            strides, N and D.
        key: ``[B, Hkv, Nk, D]`` in the query's dtype.
        value: as key.
        attn_mask: bool (True attends), or added to the scores, in the query's dtype or float32; 2
            to 4 dimensions, broadcastable to ``[B, H, Nq, Nk]``. Differentiable where it is
            added.
        dropout_p: probability of dropping a weight, 0 to 1; above 0 by reference and torch only.
        is_causal: query i sees key j only if ``j <= i + query_offset``. Joined with a mask.
        scale: of the products; None is ``1 / sqrt(D)``.
        enable_gqa: allow Hkv to be a divisor of H, each key head serving H / Hkv query heads.
        kv_lengths: int32 or int64 ``[B]``: keys from there on are not seen. Values 0 to Nk.
        query_offset: int or integer tensor ``[B]``: where the queries stand among the keys. 0 is
            torch's top-left rule, ``Nk - Nq`` the bottom-right rule that a key-value cache needs.
        return_lse: return also the log-sum-exp of every row.
        backend: None for the fastest, or "cuda", "triton", "cpu", "torch", "reference".

    Returns:
        ``[B, H, Nq, D]`` in the query's dtype, in memory ``[B, Nq, H, D]``, so that
        ``.transpose(1, 2).flatten(2)`` copies nothing; with ``return_lse`` also the natural
        logarithm ``[B, H, Nq]`` in float32, -inf for a row that sees nothing.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value; BackendRefused: ``backend``
            can't run this call.
    """
    if (
        backend is None
        and attn_mask is None
        and kv_lengths is None
        and not (dropout_p or return_lse)
        and OP.takes_cpu_kernel(query)
        and _are_usual(query, key, value, query_offset)
    ):
        args = AttentionArguments(
            query, key, value, None, None, None, is_causal, _scale(scale, query), 0.0, False
        )
        return OP.run(args, "cpu")[0]
    query, key, value = autocast(query, key, value)
    _check_shapes(query, key, value, enable_gqa)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"attention: expected dropout_p from 0 to 1; got {dropout_p}")
    offset = None if isinstance(query_offset, int) and query_offset == 0 else query_offset
    args = AttentionArguments(
        inner_contiguous(query),
        inner_contiguous(key),
        inner_contiguous(value),
        _normalise_mask(attn_mask, query, key),
        _normalise_counts("kv_lengths", kv_lengths, query, 0, key.shape[2]),
        _normalise_counts("query_offset", offset, query, None, 0),
        is_causal,
        _scale(scale, query),
        dropout_p,
        return_lse,
    )
    out, lse = OP(args, backend)
    return (out, lse) if return_lse else out
