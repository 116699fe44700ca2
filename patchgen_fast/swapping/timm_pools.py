"""timm's attentions with one query or few: class attention and attention pools.

`timm.py` holds the table of adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat, resample_abs_pos_embed
from timm.layers import attention_pool as pools
from timm.layers import attention_pool2d as pools2d
from timm.models import cait, crossvit, volo
from torch import Tensor

from ..modules.attention import attend_with, project_out
from ..modules.fused import add_to_residual, inactive, plain_linear, project, split_heads
from ..modules.state import FastLayer


class FastClassAttn(FastLayer, cait.ClassAttn):
    """CaiT's `ClassAttn`: the class token asks, all tokens answer."""

    def forward(self, x: Tensor) -> Tensor:
        self._count_call()
        (query,) = split_heads(project(self, x[:, 0], self.q)[:, None], 1, self.num_heads)
        (key,) = split_heads(project(self, x, self.k), 1, self.num_heads)
        (value,) = split_heads(project(self, x, self.v), 1, self.num_heads)
        out = attend_with(self, query, key, value, drop=self.attn_drop)
        return project_out(self, out, self.proj, self.proj_drop, None)


class FastClassAttention(FastLayer, volo.ClassAttention):
    """VOLO's `ClassAttention`."""

    def forward(self, x: Tensor) -> Tensor:
        self._count_call()
        (query,) = split_heads(project(self, x[:, :1], self.q), 1, self.num_heads)
        key, value = split_heads(project(self, x, self.kv), 2, self.num_heads)
        out = attend_with(self, query, key, value, drop=self.attn_drop, scale=self.scale)
        return project_out(self, out, self.proj, self.proj_drop, None)


class FastCrossAttention(FastLayer, crossvit.CrossAttention):
    """CrossViT's `CrossAttention`: the class token asks, the tokens of the other branch answer."""

    def forward(self, x: Tensor) -> Tensor:
        self._count_call()
        (query,) = split_heads(project(self, x[:, :1], self.wq), 1, self.num_heads)
        (key,) = split_heads(project(self, x, self.wk), 1, self.num_heads)
        (value,) = split_heads(project(self, x, self.wv), 1, self.num_heads)
        out = attend_with(self, query, key, value, drop=self.attn_drop, scale=self.scale)
        return project_out(self, out, self.proj, self.proj_drop, None)


class FastAttentionPoolLatent(FastLayer, pools.AttentionPoolLatent):
    """`AttentionPoolLatent`: learned queries, which are projected once for the whole batch."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        self._count_call()
        batch = x.shape[0]
        if self.pos_embed is not None:
            x = x + self.pos_embed[None].to(x.dtype)
        # Whoever watches the projection sees the whole batch, as in timm.
        once = (plain_linear(self.q) or inactive(self.q)) and inactive(self.q_norm)
        latent = self.latent if once else self.latent.expand(batch, -1, -1)
        (query,) = split_heads(project(self, latent, self.q), 1, self.num_heads)
        key, value = split_heads(project(self, x, self.kv), 2, self.num_heads)
        query, key = self.q_norm(query), self.k_norm(key)
        query = query.expand(batch, -1, -1, -1)
        out = attend_with(self, query, key, value, attn_mask)
        x = project_out(self, out, self.proj, self.proj_drop, None)
        if self.mlp is not None:
            x = add_to_residual(x, self.mlp, self.norm(x))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x


class FastAttentionPoolPrr(FastLayer, pools.AttentionPoolPrr):
    """`AttentionPoolPrr`: the tokens themselves are queries, keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        self._count_call()
        (heads,) = split_heads(self.pre_norm(x), 1, self.num_heads)
        out = attend_with(self, heads, heads, heads)
        x = self.post_norm(out.transpose(1, 2).flatten(2))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x


class _FusedAttentionPool2d(FastLayer):
    """A pool over a map `[B, C, H, W]`: attention of its places and of their mean or a class token.

    Where only the first token is asked for, only that one asks.
    """

    num_heads: int
    qkv: Any
    proj: Any
    drop: Any
    pool_type: str

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        self._count_call()
        layer: Any = self
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        first = layer.cls_token
        first = x.mean(1, keepdim=True) if first is None else first.expand(len(x), -1, -1)
        x = self._positioned(torch.cat((first, x), dim=1), height, width)
        if self.qkv is None:
            query, key, value = (
                split_heads(project(self, x, projection), 1, self.num_heads)[0]
                for projection in (layer.q, layer.k, layer.v)
            )
        else:
            query, key, value = split_heads(project(self, x, self.qkv), 3, self.num_heads)
        query, key = self._rotated(query, key, height, width)
        if self.pool_type == "token" and inactive(self.drop):
            query = query[:, :, :1]
        out = attend_with(self, query, key.to(value.dtype), value)
        x = out.transpose(1, 2).flatten(2)
        x = x if inactive(self.drop) else self.drop(x)
        if not pre_logits:
            x = project(self, x, self.proj)
        pooled: Tensor = layer._pool(x, height, width)
        return pooled

    def _positioned(self, x: Tensor, height: int, width: int) -> Tensor:
        return x

    def _rotated(
        self, query: Tensor, key: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        return query, key


class FastAttentionPool2d(_FusedAttentionPool2d, pools2d.AttentionPool2d):
    """timm's `AttentionPool2d` around the fused core."""

    def _positioned(self, x: Tensor, height: int, width: int) -> Tensor:
        positions = resample_abs_pos_embed(
            self.pos_embed[None], (height, width), old_size=self.feat_size, num_prefix_tokens=1
        )
        return x + positions


class FastRotAttentionPool2d(_FusedAttentionPool2d, pools2d.RotAttentionPool2d):
    """timm's `RotAttentionPool2d` around the fused core."""

    def _rotated(
        self, query: Tensor, key: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        rope = self.pos_embed.get_embed((height, width))
        if isinstance(rope, tuple):
            rope = torch.cat(rope, dim=-1)
        return self._rotated_places(query, rope), self._rotated_places(key, rope)

    def _rotated_places(self, x: Tensor, rope: Tensor) -> Tensor:
        places = apply_rot_embed_cat(x[:, :, 1:], rope, half=self.rotate_half)
        return torch.cat((x[:, :, :1], places), dim=2).to(x.dtype)
