"""timm's self-attentions around the fused core; `timm.py` holds the table of adapters."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import attention as timm_attention
from timm.models import beit, eva
from torch import Tensor

from ..modules.attention import FusedAttention, attend_with, project_and_drop
from ..modules.fused import (
    child,
    inactive,
    multiply_weight,
    normalise_heads,
    plain_linear,
    project,
    split_heads,
    takes_residual,
)
from ..modules.state import FastLayer


class _FusedTimmAttention(FastLayer):
    """What timm's self-attentions have in common, after query, key and value are there."""

    num_heads: int
    attn_drop: Any
    proj: Any
    proj_drop: Any
    qkv_bias_separate: bool

    def _attend(
        self,
        x: Tensor,
        heads: tuple[Tensor, Tensor, Tensor],
        attn_mask: Tensor | None,
        is_causal: bool,
        residual: Tensor | None,
    ) -> Tensor:
        """Attention, normalisation of the joined heads, gate and output projection."""
        out = attend_with(self, *heads, attn_mask, is_causal, self.attn_drop)
        merged = out.transpose(1, 2).flatten(2)
        norm, gate = child(self, "norm"), child(self, "gate")
        if norm is not None and not inactive(norm):
            merged = norm(merged)
        if gate is not None:
            merged = merged * project(self, x, gate).sigmoid()
        return project_and_drop(self, merged, self.proj, self.proj_drop, residual)

    def _packed(self, x: Tensor, qkv: Any, bias: Tensor | None) -> tuple[Tensor, ...]:
        """Query, key and value `[B, H, N, D]` of a packed projection, as views."""
        if bias is None:
            packed = project(self, x, qkv)
        elif self.qkv_bias_separate and not plain_linear(qkv):
            packed = qkv(x) + bias
        else:
            packed = multiply_weight(self, x, qkv, bias)
        return split_heads(packed, 3, self.num_heads)

    def _query_value_bias(self) -> Tensor | None:
        """The bias of a packed projection whose keys have none (BEiT, EVA)."""
        layer: Any = self
        if layer.q_bias is None:
            return None
        return torch.cat((layer.q_bias, layer.k_bias, layer.v_bias))


@takes_residual
class FastAttention(FusedAttention, timm_attention.Attention):
    """timm's `Attention` around the fused core."""

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self.fused_forward(x, attn_mask, is_causal)


class _FusedRopeAttention(_FusedTimmAttention):
    """Self-attention with rotary embedding, packed or split projections, grouped keys."""

    qkv: Any
    q_norm: Any
    k_norm: Any
    num_prefix_tokens: int

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return self.fused_forward(x, rope, attn_mask, is_causal)

    def fused_forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`forward(x) + residual`."""
        self._count_call()
        query, key, value = self._heads(x)
        cos_sin = None
        if rope is not None:
            sin, cos = rope.chunk(2, dim=-1)
            cos_sin = (cos, sin)
        query, key = normalise_heads(
            self,
            query,
            key,
            self.q_norm,
            self.k_norm,
            cos_sin,
            interleaved=not getattr(self, "rotate_half", False),
            num_prefix_tokens=self.num_prefix_tokens,
        )
        heads = (query.to(value.dtype), key.to(value.dtype), value)
        return self._attend(x, heads, attn_mask, is_causal, residual)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        layer: Any = self
        if self.qkv is not None:
            bias = self._query_value_bias() if hasattr(self, "q_bias") else None
            return self._packed(x, self.qkv, bias)
        groups = (self.num_heads, *[getattr(self, "num_kv_heads", self.num_heads)] * 2)
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        return tuple(
            split_heads(project(self, x, projection), 1, heads)[0]
            for projection, heads in zip(projections, groups, strict=True)
        )


@takes_residual
class FastAttentionRope(_FusedRopeAttention, timm_attention.AttentionRope):
    """timm's `AttentionRope` around the fused core."""


@takes_residual
class FastEvaAttention(_FusedRopeAttention, eva.EvaAttention):
    """timm's `EvaAttention` around the fused core."""


@takes_residual
class FastBeitAttention(_FusedTimmAttention, beit.Attention):
    """timm's BEiT `Attention`: a learned bias between positions is added to the scores."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return self.fused_forward(x, shared_rel_pos_bias)

    def fused_forward(
        self,
        x: Tensor,
        shared_rel_pos_bias: Tensor | None = None,
        *,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`forward(x) + residual`."""
        self._count_call()
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        query, key, value = self._packed(x, self.qkv, self._query_value_bias())
        if bias is not None and bias.dtype not in (query.dtype, torch.float32):
            bias = bias.to(query.dtype)
        return self._attend(x, (query, key, value), bias, False, residual)
