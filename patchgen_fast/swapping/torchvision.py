"""Adapters for torchvision's ViT and Swin; its ViT's attention is that of `torch.nn`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import swin_transformer, vision_transformer
from torchvision.ops.misc import MLP

from ..modules.attention import attend_with
from ..modules.fused import (
    add_then_norm,
    add_to_residual,
    inactive,
    multiply_weight,
    project,
    split_heads,
    takes_residual,
)
from ..modules.patch_conv import FastPatchConv2d
from ..modules.state import FastLayer
from .adapters import Adapter, Reason, not_a_patch_conv


class FastShiftedWindowAttention(FastLayer, swin_transformer.ShiftedWindowAttention):
    """torchvision's `ShiftedWindowAttention` around the fused core."""

    def forward(self, x: Tensor) -> Tensor:
        self._count_call()
        batch, height, width, _ = x.shape
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        padded = x.shape[1:3]
        shift = [
            0 if window >= side else step
            for window, side, step in zip(self.window_size, padded, self.shift_size, strict=True)
        ]
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        windows = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
        windows = windows.transpose(2, 3).flatten(3, 4).flatten(0, 2)
        heads = split_heads(self._packed(windows), 3, self.num_heads)
        query, key, scale = self._scaled(heads[0], heads[1])
        bias = self.get_relative_position_bias()
        if any(shift):
            seen = bias + _apart(padded, self.window_size, shift, x)[:, None]
            bias = seen.expand(batch, *seen.shape).flatten(0, 1)
        if bias.dtype not in (query.dtype, torch.float32):
            bias = bias.to(query.dtype)
        drop = nn.Dropout(self.attention_dropout).train(self.training)
        out = attend_with(self, query, key, heads[2], bias, drop=drop, scale=scale)
        x = multiply_weight(self, out.transpose(1, 2).flatten(2), self.proj, self.proj.bias)
        x = F.dropout(x, self.dropout, self.training)
        x = x.reshape(batch, padded[0] // rows, padded[1] // columns, rows, columns, -1)
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(shift):
            x = x.roll((shift[0], shift[1]), (1, 2))
        return x[:, :height, :width].contiguous()

    def _packed(self, x: Tensor) -> Tensor:
        return multiply_weight(self, x, self.qkv, self.qkv.bias)

    def _scaled(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, float | None]:
        return query, key, None


class FastShiftedWindowAttentionV2(
    FastShiftedWindowAttention, swin_transformer.ShiftedWindowAttentionV2
):
    """torchvision's `ShiftedWindowAttentionV2`: cosine attention, keys without bias."""

    def _packed(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias
        if bias is not None:
            query, key, value = bias.chunk(3)
            bias = torch.cat((query, torch.zeros_like(key), value))
        return multiply_weight(self, x, self.qkv, bias)

    def _scaled(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, float | None]:
        arithmetic = torch.promote_types(query.dtype, torch.float32)
        scale = self.logit_scale.to(arithmetic).clamp(max=math.log(100.0)).exp()
        unit_query = F.normalize(query.to(arithmetic), dim=-1) * scale
        unit_key = F.normalize(key.to(arithmetic), dim=-1)
        return unit_query.to(query.dtype), unit_key.to(query.dtype), 1.0


def _apart(padded: Any, window: Any, shift: list[int], like: Tensor) -> Tensor:
    """-100 between places that only the shift brought into one window: `[W, N, N]`."""
    regions = []
    for side, size, step in zip(padded, window, shift, strict=True):
        places = torch.arange(side, device=like.device)
        regions.append((places >= side - size).int() + (places >= side - step).int())
    region = 3 * regions[0][:, None] + regions[1]
    region = region.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0]))
    region = region.transpose(1, 2).flatten(2).flatten(0, 1)
    return -100.0 * (region[:, None] != region[:, :, None]).to(like.dtype)


@takes_residual
class FastMLPBlock(FastLayer, vision_transformer.MLPBlock):
    """The ViT's `MLPBlock`: activation and residual in its products."""

    def forward(self, input: Tensor) -> Tensor:
        return self.fused_forward(input)

    def fused_forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """`forward(x) + residual`."""
        self._count_call()
        return _mlp(self, x, residual)


@takes_residual
class FastMLP(FastLayer, MLP):
    """Swin's `MLP`: activation and residual in its products."""

    def forward(self, input: Tensor) -> Tensor:
        return self.fused_forward(input)

    def fused_forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """`forward(x) + residual`."""
        self._count_call()
        return _mlp(self, x, residual)


def _mlp(layer: Any, x: Tensor, residual: Tensor | None) -> Tensor:
    first, activation, drop1, second, drop2 = layer
    hidden = project(layer, x, first, activation=activation)
    if not inactive(drop1):
        hidden = drop1(hidden)
    if inactive(drop2):
        return project(layer, hidden, second, residual=residual)
    out: Tensor = drop2(project(layer, hidden, second))
    return out if residual is None else residual + out


def _another_mlp(module: Any) -> Reason | None:
    """Linear, activation, dropout, linear, dropout, and nothing else."""
    kinds = [type(child) for child in module]
    if len(kinds) == 5 and kinds[::3] == [nn.Linear] * 2 and kinds[2::2] == [nn.Dropout] * 2:
        return None
    return Reason("layers", "it is not two linear maps with an activation between them")


class FastEncoderBlock(FastLayer, vision_transformer.EncoderBlock):
    """The ViT's `EncoderBlock`: sums in the products, or together with the normalisation."""

    def forward(self, input: Tensor) -> Tensor:
        self._count_call()
        torch._assert(
            input.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {input.shape}"
        )
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = x if inactive(self.dropout) else self.dropout(x)
        x, normalised = add_then_norm(self, input, x, self.ln_2)
        return add_to_residual(x, self.mlp, normalised)


_CONV = Adapter(nn.Conv2d, FastPatchConv2d, "patch_embed", refuse=not_a_patch_conv)

# fingerprints: of torchvision 0.28; MLPs are known by their children
ADAPTERS = (
    Adapter(
        swin_transformer.ShiftedWindowAttention,
        FastShiftedWindowAttention,
        "attention",
        fingerprints=("3582be5017d6c923",),
    ),
    Adapter(
        swin_transformer.ShiftedWindowAttentionV2,
        FastShiftedWindowAttentionV2,
        "attention",
        fingerprints=("8e3f59ae248a73a4",),
    ),
    Adapter(vision_transformer.MLPBlock, FastMLPBlock, "feed_forward", refuse=_another_mlp),
    Adapter(MLP, FastMLP, "feed_forward", refuse=_another_mlp),
    Adapter(
        vision_transformer.EncoderBlock,
        FastEncoderBlock,
        "layer",
        fingerprints=("601f66859336369f",),
    ),
)
PARTS = {
    vision_transformer.VisionTransformer: {"conv_proj": _CONV},
    swin_transformer.SwinTransformer: {"features.0.0": _CONV},
}
