"""Attention of packed sequences of unequal lengths, without padding.

Shapes: query ``[Tq, H, D]``, key and value ``[Tk, Hkv, D]``, any strides; int32 offsets ``[S +
1]`` of both, rising from 0: sequence s is rows ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. Causal
is bottom-right within each sequence, as in flash-attn: its last query sees its last key. Rows
past the last offset are 0, their log-sum-exp -inf.

Arithmetic and backward as attention's; out ``[Tq, H, D]`` is contiguous, lse float32 ``[H, Tq]``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference, stock, triton
from ..dispatch import Refusal
from ..registry import Op
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
from .attention import HEAD_DIM


class VarlenAttentionArguments(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    is_causal: bool
    scale: float


class VarlenAttentionBackwardArguments(NamedTuple):
    grad_out: Tensor
    grad_lse: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    is_causal: bool
    scale: float


_SEQUENCES = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "bool is_causal, float scale"
)
SCHEMA = f"(Tensor query, Tensor key, Tensor value, {_SEQUENCES}) -> (Tensor out, Tensor lse)"
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {_SEQUENCES}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


def _fake(query, key, value, *rest):
    tokens, heads, _ = query.shape
    lse = query.new_empty((heads, tokens), dtype=reference.arithmetic_dtype(query.dtype))
    return query.new_empty(query.shape), lse


def _backward_fake(grad_out, grad_lse, query, key, value, *rest):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs, output):
    query, key, value, cu_q, cu_k, ctx.max_q, ctx.max_k, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, cu_q, cu_k)


def _backward(ctx, grad_out, grad_lse):
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[3])
    sizes = (ctx.max_q, ctx.max_k, ctx.is_causal, ctx.scale)
    grads = OP.run_backward(ctx, grad_out, grad_lse, *saved, *sizes)
    return (*grads, None, None, None, None, None, None)


def _flops(query_shape, key_shape, value_shape, cu_q, cu_k, max_q, max_k, *args, **kwargs) -> int:
    """As torch's own counter for flash attention: every sequence as long as the longest."""
    _, heads, dim = query_shape
    return 4 * (cu_q[0] - 1) * heads * max_q * max_k * dim


def _backward_flops(grad_shape, grad_lse, query, key, value, out, lse, *rest, **kwargs) -> int:
    return _flops(query, key, value, *rest) * 5 // 2


# SDPA takes one sequence at a time, so the offsets must be read; on a GPU that would stop it, and a
# graph being traced has no values to read.
OFFSETS_UNREAD = Refusal(
    "offsets",
    "stock SDPA needs the offsets' values, which are not read on a GPU or while tracing",
    lambda a: a.query.device.type != "cpu" or torch.compiler.is_compiling(),
)
FLOAT64 = float64_of("query")

OP = Op(
    "varlen_attention",
    SCHEMA,
    BACKWARD_SCHEMA,
    VarlenAttentionBackwardArguments,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
    reference=reference.varlen_attention,
    reference_backward=reference.varlen_attention_backward,
    flops=_flops,
    backward_flops=_backward_flops,
)
OP.add_torch(stock.varlen_attention, refuses=(FLOAT64, OFFSETS_UNREAD))


def _native_forward(*args):
    return torch.ops.patchgen_fast_native.varlen_attention(*args)


def _native_backward(*args):
    return torch.ops.patchgen_fast_native.varlen_attention_backward(*args)


OP.add_native(
    "cpu",
    refuses=(NOT_ON_CPU, FLOAT64, HEAD_DIM),
    refuses_backward=(NOT_ON_CPU, FLOAT64, HEAD_DIM),
    forward=_native_forward,
    backward=_native_backward,
)
OP.add_native(
    "cuda",
    _cuda_limits.VARLEN_ATTENTION,
    _cuda_limits.VARLEN_ATTENTION_BACKWARD,
    forward=_native_forward,
    backward=_native_backward,
)
OP.add_kernels(
    "triton",
    "patchgen_fast.triton.varlen_attention:varlen_attention",
    "patchgen_fast.triton.varlen_attention:varlen_attention_backward",
    refuses=(NOT_FOR_TRITON, FLOAT64, HEAD_DIM),
    refuses_backward=(NOT_FOR_TRITON, FLOAT64, HEAD_DIM),
    unavailable=triton.unavailable_reason(),
)


def _check_offsets(name: str, offsets: Any, query: Tensor) -> None:
    if not isinstance(offsets, Tensor) or offsets.device != query.device:
        check_tensors("varlen_attention", {"query": query, name: offsets})
    if offsets.dtype != torch.int32 or offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(
            f"varlen_attention: expected {name} as int32 [S + 1]; got {describe(offsets)}. "
            "Make it with torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()"
        )


def _check_values(name: str, offsets: Tensor, tokens: int, longest: Any) -> None:
    if not is_readable(offsets):
        return
    values = offsets.tolist()
    lengths = [b - a for a, b in zip(values, values[1:], strict=False)]
    if values[0] != 0 or min(lengths, default=0) < 0 or values[-1] > tokens:
        raise ValueError(
            f"varlen_attention: expected {name} to rise from 0 to at most {tokens}; got {values}"
        )
    if max(lengths, default=0) > longest:
        raise ValueError(
            f"varlen_attention: expected the longest sequence of {name} within the max_seqlen of "
            f"{longest}; got {max(lengths)}"
        )


def _are_alike(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this is the usual call, right in all that ``_check_shapes`` looks at one by one."""
    if not isinstance(query, Tensor) or not isinstance(key, Tensor):
        return False
    shape, key_shape, dtype, device = query.shape, key.shape, query.dtype, query.device
    return (
        len(shape) == len(key_shape) == 3
        and dtype in FLOATS
        and shape[1:] == key_shape[1:]
        and key.dtype == dtype
        and key.device == device
        and is_like(value, key_shape, device, (dtype,))
    )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    if _are_alike(query, key, value):
        return
    check_tensors("varlen_attention", {"query": query, "key": key, "value": value})
    check_shape("varlen_attention", "query", query, (None, None, None))
    check_float("varlen_attention", query=query)
    check_same_dtype("varlen_attention", query.dtype, "query", key=key, value=value)
    _, heads, dim = query.shape
    check_shape("varlen_attention", "key", key, (None, None, dim))
    check_shape("varlen_attention", "value", value, tuple(key.shape))
    check_heads("varlen_attention", heads, key.shape[1], enable_gqa)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attention within each of several packed sequences.

    Args:
        query: ``[Tq, H, D]`` in float32, bfloat16, float16 (float64: reference only).
        key: ``[Tk, Hkv, D]`` in the query's dtype.
        value: as key.
        cu_seqlens_q: int32 ``[S + 1]``, rising from 0: where each sequence's queries begin and
            the last ends.
        cu_seqlens_k: the same of keys.
        max_seqlen_q: the longest sequence's queries, or more.
        max_seqlen_k: the longest sequence's keys, or more.
        is_causal: query i of a sequence with n queries and m keys sees key j only if ``j <= i + m
            - n``.
        scale: of the products; None is ``1 / sqrt(D)``.
        enable_gqa: allow Hkv to be a divisor of H.
        backend: None for the fastest, or "cuda", "triton", "cpu", "torch", "reference".

    Returns:
        ``[Tq, H, D]``, contiguous, in the query's dtype; 0 in rows past the last offset and in
        rows that see nothing.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or offset; BackendRefused: ``backend``
            can't run this call.
    """
    query, key, value = autocast(query, key, value)
    _check_shapes(query, key, value, enable_gqa)
    _check_offsets("cu_seqlens_q", cu_seqlens_q, query)
    _check_values("cu_seqlens_q", cu_seqlens_q, query.shape[0], max_seqlen_q)
    if cu_seqlens_k is not cu_seqlens_q:
        _check_offsets("cu_seqlens_k", cu_seqlens_k, query)
    _check_values("cu_seqlens_k", cu_seqlens_k, key.shape[0], max_seqlen_k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        check_shape("varlen_attention", "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape))
    args = VarlenAttentionArguments(
        inner_contiguous(query),
        inner_contiguous(key),
        inner_contiguous(value),
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        max_seqlen_q,
        max_seqlen_k,
        is_causal,
        1.0 / math.sqrt(query.shape[2]) if scale is None else float(scale),
    )
    return OP(args, backend)[0]
