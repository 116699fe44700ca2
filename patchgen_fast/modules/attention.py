"""Multi-head attention layers around the fused core.

The query, key and value of a packed projection go into `attention` as strided views, its result
comes back in the layout of the output projection, and a residual is added by that projection: no
tensor is copied in between.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..models.cache import KeyValueCache
from ..models.layers import check_tokens, head_dim_of
from ..ops.attention import attention
from .fused import child, inactive, normalise_heads, project, split_heads, takes_residual
from .recording import record
from .state import FastLayer, LayerState


def attend_with(
    owner: FastLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    drop: nn.Module | None = None,
    cache: KeyValueCache | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one layer with its backend and its dropout: `[B, H, Nq, D]`.

    With a cache the keys are those so far, and causal counts the queries as the last of them.
    """
    past, lengths = 0, None
    if cache is not None:
        past, lengths = cache.length, cache.lengths
        key, value = cache.append(key, value)
        is_causal = is_causal and query.shape[2] > 1  # the newest token sees all of the cache
    dropout_p = 0.0
    if isinstance(drop, nn.Dropout) and drop.training:
        dropout_p = drop.p
    if dropout_p > 0.0 and owner._fast.backend is None:
        owner._count_fallback("dropout")
    out: Any = attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kv_lengths=lengths,
        query_offset=past if is_causal else 0,
        backend=owner._fast.backend,
    )
    record(owner, query, key, attn_mask, is_causal, scale, past)
    return out


def project_out(
    owner: FastLayer, heads: Tensor, proj: nn.Module, drop: nn.Module, residual: Tensor | None
) -> Tensor:
    """Heads `[B, H, N, D]` through the output projection and its dropout, plus a residual."""
    merged = heads.transpose(1, 2).flatten(2)
    return project_and_drop(owner, merged, proj, drop, residual)


def project_and_drop(
    owner: FastLayer, x: Tensor, proj: nn.Module, drop: nn.Module, residual: Tensor | None
) -> Tensor:
    """`drop(proj(x)) + residual`; the product makes the sum where nothing is dropped."""
    if inactive(drop):
        return project(owner, x, proj, residual=residual)
    out = drop(project(owner, x, proj))
    return out if residual is None else residual + out


class FusedAttention(FastLayer):
    """Forward of self-attention for any class with timm's names: `qkv`, `q_norm`, `k_norm`,
    `proj`, and where it has them `norm` (of the heads) and `gate`.
    """

    num_heads: int
    head_dim: int
    qkv: Any
    q_norm: Any
    k_norm: Any
    attn_drop: Any
    proj: Any
    proj_drop: Any

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Tokens `[B, N, E]` to `[B, N, E]`.

        Args:
            x: tokens; with a cache, those that follow what the cache holds.
            attn_mask: bool (True attends) or added to the scores, broadcastable to `[B, H, N, N]`.
            is_causal: every token sees itself and the past only.
            cache: keys and values of the past, to which those of x are added.
        """
        return self.fused_forward(x, attn_mask, is_causal, cache=cache)

    def fused_forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`forward(x) + residual`."""
        self._count_call()
        query, key, value = split_heads(project(self, x, self.qkv), 3, self.num_heads)
        query, key = normalise_heads(self, query, key, self.q_norm, self.k_norm)
        heads = attend_with(self, query, key, value, attn_mask, is_causal, self.attn_drop, cache)
        merged = heads.transpose(1, 2).flatten(2)
        norm, gate = child(self, "norm"), child(self, "gate")
        if norm is not None and not inactive(norm):
            merged = norm(merged)
        if gate is not None:
            merged = merged * project(self, x, gate).sigmoid()
        return project_and_drop(self, merged, self.proj, self.proj_drop, residual)


class FusedCrossAttention(FastLayer):
    """Forward of cross-attention with `q`, `kv`, `q_norm`, `k_norm` and `proj`."""

    num_heads: int
    head_dim: int
    memory_dim: int
    q: Any
    kv: Any
    q_norm: Any
    k_norm: Any
    attn_drop: Any
    proj: Any
    proj_drop: Any

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        attn_mask: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Tokens `[B, N, E]` and memory `[B, M, memory_dim]` to `[B, N, E]`.

        Args:
            x: tokens that ask.
            memory: tokens that are looked at.
            attn_mask: bool (True attends) or added to the scores, broadcastable to `[B, H, N, M]`.
            cache: takes the memory's keys and values at the first call and gives them afterwards.
        """
        return self.fused_forward(x, memory, attn_mask, cache=cache)

    def fused_forward(
        self,
        x: Tensor,
        memory: Tensor,
        attn_mask: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`forward(x, memory) + residual`."""
        self._count_call()
        check_tokens(x, self.num_heads * self.head_dim)
        (query,) = split_heads(project(self, x, self.q), 1, self.num_heads)
        if cache is not None and cache.length > 0:
            query = self.q_norm(query)
            key, value = cache.view()
        else:
            check_tokens(memory, self.memory_dim, "memory")
            key, value = split_heads(project(self, memory, self.kv), 2, self.num_heads)
            query, key = self._normalise(query, key)
            if cache is not None:
                key, value = cache.append(key, value)
        heads = attend_with(self, query, key, value, attn_mask, drop=self.attn_drop)
        return project_out(self, heads, self.proj, self.proj_drop, residual)

    def _normalise(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if query.shape[2] == key.shape[2]:  # the op takes query and key of one length
            return normalise_heads(self, query, key, self.q_norm, self.k_norm)
        return self.q_norm(query), self.k_norm(key)


@takes_residual
class Attention(FusedAttention, nn.Module):
    """Multi-head self-attention, fast: tokens `[B, N, E]` to `[B, N, E]`.

    Parameters `qkv`, `q_norm`, `k_norm`, `proj`, and `norm`, `gate` where asked for: names, order
    of arguments and meaning as in timm's `Attention`, whose weights load.

    Args:
        dim: E of the tokens.
        num_heads: H.
        attn_head_dim: D of a head; None is dim / H.
        dim_out: E of the result; None is dim.
        qkv_bias: biases in the query, key and value projection.
        qk_norm: normalise queries and keys over D by `norm_layer`.
        scale_norm: normalise the joined heads by `norm_layer` before the output projection.
        proj_bias: bias in the output projection.
        gated: multiply the joined heads by a sigmoid gate of the tokens.
        attn_drop: dropout of attention weights, in training; stock operators do it.
        proj_drop: dropout of the result, in training.
        norm_layer: class of the normalisations.
        backend: None for the fastest, or a backend by name.

    Raises:
        ValueError: heads that do not divide dim, an unknown backend; at a call, tokens of
            another shape.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or head_dim_of(dim, num_heads)
        inner = num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias, **kind)
        self.q_norm = norm_layer(self.head_dim, **kind) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **kind) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(inner, **kind) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, inner, bias=qkv_bias, **kind) if gated else None
        self.proj = nn.Linear(inner, dim_out or dim, bias=proj_bias, **kind)
        self.proj_drop = nn.Dropout(proj_drop)
        self._fast = LayerState(backend)

    def fused_forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`forward(x) + residual`."""
        check_tokens(x, self.dim)
        return super().fused_forward(x, attn_mask, is_causal, cache=cache, residual=residual)


@takes_residual
class CrossAttention(FusedCrossAttention, nn.Module):
    """Multi-head attention from tokens `[B, N, E]` to a memory `[B, M, memory_dim]`, fast.

    Parameters `q`, `kv`, `q_norm`, `k_norm`, `proj`.

    Args:
        dim: E of the tokens.
        num_heads: H.
        qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, norm_layer: as in `Attention`.
        memory_dim: E of the memory; None is dim.
        backend: None for the fastest, or a backend by name.

    Raises:
        ValueError: heads that do not divide dim, an unknown backend; at a call, tokens or
            memory of another shape.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
        *,
        memory_dim: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = head_dim_of(dim, num_heads)
        self.memory_dim = memory_dim or dim
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **kind)
        self.kv = nn.Linear(self.memory_dim, 2 * dim, bias=qkv_bias, **kind)
        self.q_norm = norm_layer(self.head_dim, **kind) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **kind) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **kind)
        self.proj_drop = nn.Dropout(proj_drop)
        self._fast = LayerState(backend)
