"""timm's attentions with a bias between positions: Swin's windows, MaxViT, relative position ViTs,
SAM. `timm.py` holds the table of adapters.

The bias goes into the kernel as an additive mask, and its gradient comes back through it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models import (
    maxxvit,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    vision_transformer_relpos,
    vision_transformer_sam,
)
from torch import Tensor

from ..modules.attention import attend_with, project_and_drop, project_out
from ..modules.fused import normalise_heads, project, split_heads, takes_residual
from ..modules.state import FastLayer
from ..ops.qk_norm_rope import qk_norm_rope
from .timm_attention import _FusedTimmAttention


def _as_mask(bias: Tensor | None, query: Tensor) -> Tensor | None:
    """A bias in a dtype that `attention` takes."""
    if bias is None or bias.dtype in (query.dtype, torch.float32):
        return bias
    return bias.to(query.dtype)


def _windows_mask(bias: Tensor, windows: Tensor | None, query: Tensor) -> Tensor | None:
    """Bias `[1, H, N, N]` plus the mask `[W, N, N]` of W windows an image, for `[B * W, H, N, D]`.

    Not copied where every window has the same mask, or where there is one image.
    """
    bias = bias.contiguous()  # a table's columns, which the sum would walk across
    if windows is None:
        return _as_mask(bias, query)
    joined = bias + windows[:, None]
    images = query.shape[0] // windows.shape[0]
    if images > 1:
        joined = joined.expand(images, *joined.shape).flatten(0, 1)
    return _as_mask(joined, query)


class _FusedWindowAttention(_FusedTimmAttention):
    """Windows `[B * W, N, E]` with a bias between their positions."""

    qkv: Any

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self._count_call()
        query, key, value = self._packed(x, self.qkv, self._packed_bias())
        query, key, scale = self._scaled(query, key)
        seen = _windows_mask(self._position_bias(), mask, query)
        out = attend_with(self, query, key, value, seen, drop=self.attn_drop, scale=scale)
        return project_out(self, out, self.proj, self.proj_drop, None)

    def _packed_bias(self) -> Tensor | None:
        return None

    def _scaled(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, float | None]:
        """Query and key, and the scale of their products."""
        return query, key, None

    def _position_bias(self) -> Tensor:
        raise NotImplementedError


class FastWindowAttention(_FusedWindowAttention, swin_transformer.WindowAttention):
    """timm's Swin `WindowAttention` around the fused core."""

    def _position_bias(self) -> Tensor:
        bias: Tensor = self._get_rel_pos_bias()
        return bias


class _FusedCosineAttention(_FusedWindowAttention):
    """Scaled cosine attention (Liu et al., 2022, Swin Transformer V2, arXiv:2111.09883)."""

    logit_scale: Tensor

    def _scaled(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, float | None]:
        """Unit vectors, both times the root of their head's scale: the products are the scores.

        In float32 or better and rounded once, where eager rounds after every step. A rotation by
        no angle whose cosine is that root does it in one pass: `norm` divides by the root of the
        mean square, and the length of a unit vector is bounded by 1e-12 as in `F.normalize`.
        """
        arithmetic = torch.promote_types(query.dtype, torch.float32)
        dim = query.shape[-1]
        scale = self.logit_scale.to(arithmetic).reshape(1, self.num_heads, 1, 1)
        root = scale.clamp(max=math.log(1.0 / 0.01)).mul(0.5).exp()
        if dim % 2:  # no pairs to rotate
            query, key = (
                (F.normalize(x.to(arithmetic), dim=-1) * root).to(x.dtype) for x in (query, key)
            )
            return query, key, 1.0
        cos = (root * dim**-0.5).expand(-1, -1, 1, dim)
        query, key = qk_norm_rope(
            query,
            key,
            norm="rms",
            eps=1e-24 / dim,
            cos_sin=(cos, torch.zeros_like(cos)),
            backend=self._backend("qk_norm_rope"),
        )
        return query, key, 1.0


class FastWindowAttentionV2(_FusedCosineAttention, swin_transformer_v2.WindowAttention):
    """timm's Swin V2 `WindowAttention` around the fused core."""

    def _packed_bias(self) -> Tensor | None:
        return self._query_value_bias()

    def _position_bias(self) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        area = self.window_size[0] * self.window_size[1]
        bias = table[self.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
        return 16 * torch.sigmoid(bias)[None]


class FastWindowMultiHeadAttention(
    _FusedCosineAttention, swin_transformer_v2_cr.WindowMultiHeadAttention
):
    """timm's Swin V2 CR `WindowMultiHeadAttention` around the fused core."""

    def _position_bias(self) -> Tensor:
        bias: Tensor = self._relative_positional_encodings()
        return bias


def _relative_bias(layer: Any, shared: Tensor | None) -> Tensor | None:
    """The layer's own position bias, else the model's; timm's layers never add both."""
    if layer.rel_pos is not None:
        bias: Tensor = layer.rel_pos.get_bias()
        return bias
    return shared


@takes_residual
class FastRelPosAttention(_FusedTimmAttention, vision_transformer_relpos.RelPosAttention):
    """timm's `RelPosAttention` around the fused core."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return self.fused_forward(x, shared_rel_pos)

    def fused_forward(
        self,
        x: Tensor,
        shared_rel_pos: Tensor | None = None,
        *,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`forward(x) + residual`."""
        self._count_call()
        query, key, value = self._packed(x, self.qkv, None)
        query, key = normalise_heads(self, query, key, self.q_norm, self.k_norm)
        bias = _as_mask(_relative_bias(self, shared_rel_pos), query)
        return self._attend(x, (query, key, value), bias, False, residual)


class FastAttentionCl(FastLayer, maxxvit.AttentionCl):
    """MaxViT's `AttentionCl`, channels last, around the fused core."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        self._count_call()
        packed = project(self, x.flatten(1, -2), self.qkv)
        if self.head_first:
            heads = packed.unflatten(-1, (self.num_heads, 3, self.dim_head))
            query, key, value = heads.permute(3, 0, 2, 1, 4).unbind(0)
        else:
            query, key, value = split_heads(packed, 3, self.num_heads)
        bias = _as_mask(_relative_bias(self, shared_rel_pos), query)
        out = attend_with(self, query, key, value, bias, drop=self.attn_drop)
        merged = out.transpose(1, 2).reshape(*x.shape[:-1], -1)
        return project_and_drop(self, merged, self.proj, self.proj_drop, None)


class FastAttention2d(FastLayer, maxxvit.Attention2d):
    """MaxViT's `Attention2d`, channels first: its 1 x 1 convolutions are called."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        self._count_call()
        batch, _, height, width = x.shape
        packed = self.qkv(x).flatten(2).transpose(1, 2)
        if self.head_first:
            heads = packed.unflatten(-1, (self.num_heads, 3, self.dim_head))
            query, key, value = heads.permute(3, 0, 2, 1, 4).unbind(0)
        else:
            query, key, value = split_heads(packed, 3, self.num_heads)
        bias = _as_mask(_relative_bias(self, shared_rel_pos), query)
        out = attend_with(self, query, key, value, bias, drop=self.attn_drop)
        merged = out.transpose(-1, -2).reshape(batch, -1, height, width)
        return self.proj_drop(self.proj(merged))


class FastSamAttention(FastLayer, vision_transformer_sam.Attention):
    """SAM's `Attention`: a position bias of rows and columns, or a rotary embedding."""

    def forward(self, x: Tensor) -> Tensor:
        self._count_call()
        batch, height, width, _ = x.shape
        query, key, value = split_heads(
            project(self, x.reshape(batch, height * width, -1), self.qkv), 3, self.num_heads
        )
        query, key = normalise_heads(self, query, key, self.q_norm, self.k_norm)
        bias = None
        if self.use_rel_pos:
            size = (height, width)
            bias = vision_transformer_sam.get_decomposed_rel_pos_bias(
                query.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, size, size
            )
            bias = _as_mask(bias.unflatten(0, (batch, self.num_heads)), query)
        elif self.rope is not None:
            rope = self.rope.get_embed()
            query = apply_rot_embed_cat(query, rope).type_as(value)
            key = apply_rot_embed_cat(key, rope).type_as(value)
        out = attend_with(self, query, key, value, bias, drop=self.attn_drop)
        merged = out.transpose(1, 2).reshape(batch, height, width, -1)
        return project_and_drop(self, merged, self.proj, self.proj_drop, None)
