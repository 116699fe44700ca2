"""Adapters for timm.

Every class is known by its exact source (`fingerprints`): a release that changes a class is
refused for that class, with the reason, until its adapter was tested against it.
"""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from timm.layers import attention as timm_attention
from timm.layers import mlp as timm_mlp
from timm.layers import patch_embed as timm_patch_embed
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn

from ..modules.attention import project_and_drop
from ..modules.feed_forward import FusedFeedForward
from ..modules.fused import (
    ACTIVATION_TYPES,
    DROP_TYPES,
    NORM_TYPES,
    add_branch_then_norm,
    add_then_norm,
    add_to_residual,
    inactive,
    is_plain_tensor,
    project,
    takes_residual,
    unobserved,
)
from ..modules.patch_embed import FusedPatchEmbed
from ..modules.state import FastLayer
from .adapters import Adapter, Reason
from .timm_attention import (
    FastAttention,
    FastAttentionRope,
    FastBeitAttention,
    FastEvaAttention,
)

NORM_TYPES[timm.layers.LayerNorm] = "layer"
NORM_TYPES[timm.layers.RmsNorm] = "rms"
DROP_TYPES[timm.layers.DropPath] = "drop_prob"
ACTIVATION_TYPES[timm.layers.GELU] = "gelu"
ACTIVATION_TYPES[timm.layers.GELUTanh] = "gelu_tanh"
ACTIVATION_TYPES[timm.layers.Swish] = "silu"


# ----------------------------------------------------------------------- patch embed, feed-forward


class FastPatchEmbed(FusedPatchEmbed, timm_patch_embed.PatchEmbed):
    """timm's `PatchEmbed` by its op."""


class FastPatchEmbedWithSize(FusedPatchEmbed, timm_patch_embed.PatchEmbedWithSize):
    """timm's `PatchEmbedWithSize`: the grid is returned besides."""

    def _check(self, x: Tensor) -> None:
        if self.img_size is not None and any(
            side % patch for side, patch in zip(x.shape[2:], self.patch_size, strict=True)
        ):
            raise ValueError(
                f"expected images whose sides are multiples of the patch {self.patch_size}, got "
                f"{tuple(x.shape[2:])}; crop, pad or resize them"
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:  # type: ignore[override]
        height, width = x.shape[-2:]
        grid = torch.Size((height // self.patch_size[0], width // self.patch_size[1]))
        return super().forward(x), grid


@takes_residual
class FastMlp(FusedFeedForward, timm_mlp.Mlp):
    """timm's `Mlp` with activation and residual in its products."""


@takes_residual
class FastGluMlp(FastLayer, timm_mlp.GluMlp):
    """timm's `GluMlp` (also as `SwiGLUPacked`): one product for both halves."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fused_forward(x)

    def fused_forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """`forward(x) + residual`."""
        self._count_call()
        first, second = project(self, x, self.fc1).chunk(2, dim=self.chunk_dim)
        hidden = first * self.act(second) if self.gate_last else self.act(first) * second
        return _after_gate(self, hidden, residual)


@takes_residual
class FastSwiGLU(FastLayer, timm_mlp.SwiGLU):
    """timm's `SwiGLU`: the activation joins the product of the gate."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fused_forward(x)

    def fused_forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """`forward(x) + residual`."""
        self._count_call()
        hidden = project(self, x, self.fc1_g, activation=self.act) * project(self, x, self.fc1_x)
        return _after_gate(self, hidden, residual)


def _after_gate(layer: Any, hidden: Tensor, residual: Tensor | None) -> Tensor:
    for step in (layer.drop1, layer.norm):
        if not inactive(step):
            hidden = step(hidden)
    return project_and_drop(layer, hidden, layer.fc2, layer.drop2, residual)


def _convolutional(module: nn.Module) -> Reason | None:
    """A feed-forward part of 1 x 1 convolutions is another thing."""
    if isinstance(getattr(module, "fc1", None), nn.Conv2d):
        return Reason("convolutional", "its linear maps are 1 x 1 convolutions (use_conv=True)")
    return None


# ----------------------------------------------------------------------------------------- blocks


class _FusedBlock(FastLayer):
    """A pre-norm block: `x + drop_path(scale * branch)`, twice."""

    norm1: Any
    attn: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    drop_path2: Any

    def _block(self, x: Tensor, scales: tuple[Any, Any], *args: Any, **kwargs: Any) -> Tensor:
        """`scales` are modules or vectors; None and placeholders scale nothing."""
        first, second = scales
        normalised = self.norm1(x)
        if _plain_sum(first, self.drop_path1):
            x, normalised = add_branch_then_norm(
                self, x, self.attn, self.norm2, normalised, *args, **kwargs
            )
        else:
            branch = self.drop_path1(_scaled(first, self.attn(normalised, *args, **kwargs)))
            x, normalised = add_then_norm(self, x, branch, self.norm2)
        if _plain_sum(second, self.drop_path2):
            return add_to_residual(x, self.mlp, normalised)
        branch = self.mlp(normalised)
        gamma = _vector(second) if inactive(self.drop_path2) else None
        if gamma is not None and x.dtype == branch.dtype == gamma.dtype:
            return torch.addcmul(x, branch, gamma)
        return x + self.drop_path2(_scaled(second, branch))


def _plain_sum(scale: Any, drop: Any) -> bool:
    return (scale is None or (isinstance(scale, nn.Module) and inactive(scale))) and inactive(drop)


def _scaled(scale: Any, branch: Tensor) -> Tensor:
    if scale is None:
        return branch
    return scale(branch) if isinstance(scale, nn.Module) else scale * branch


def _vector(scale: Any) -> Tensor | None:
    """The vector of a layer scale that may be read."""
    if type(scale) is timm.layers.LayerScale and unobserved(scale):
        scale = scale.gamma
    return scale if isinstance(scale, Tensor) and is_plain_tensor(scale) else None


class FastBlock(_FusedBlock, vision_transformer.Block):
    """timm's ViT `Block`: sums in the products, or together with the normalisation."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        self._count_call()
        return self._block(x, (self.ls1, self.ls2), attn_mask=attn_mask, is_causal=is_causal)


class FastEvaBlock(_FusedBlock, eva.EvaBlock):
    """timm's `EvaBlock`."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        self._count_call()
        return self._block(
            x, (self.gamma_1, self.gamma_2), rope=rope, attn_mask=attn_mask, is_causal=is_causal
        )


class FastBeitBlock(_FusedBlock, beit.Block):
    """timm's BEiT `Block`."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        self._count_call()
        scales = (self.gamma_1, self.gamma_2)
        return self._block(x, scales, shared_rel_pos_bias=shared_rel_pos_bias)


# fingerprints: of timm 1.0.31
ADAPTERS = (
    Adapter(
        timm_attention.Attention, FastAttention, "attention", fingerprints=("9573bf9a33297196",)
    ),
    Adapter(
        timm_attention.AttentionRope,
        FastAttentionRope,
        "attention",
        fingerprints=("4c0743825fe6f463",),
    ),
    Adapter(eva.EvaAttention, FastEvaAttention, "attention", fingerprints=("8eca3860060d5650",)),
    Adapter(beit.Attention, FastBeitAttention, "attention", fingerprints=("1eb62a7b3361ce54",)),
    Adapter(
        timm_patch_embed.PatchEmbed,
        FastPatchEmbed,
        "patch_embed",
        fingerprints=("cee1bba5150c1f42",),
    ),
    Adapter(
        timm_patch_embed.PatchEmbedWithSize,
        FastPatchEmbedWithSize,
        "patch_embed",
        fingerprints=("2e855cd8d039773f",),
    ),
    Adapter(
        timm_mlp.Mlp,
        FastMlp,
        "feed_forward",
        refuse=_convolutional,
        fingerprints=("0b402fa7d2a6c5a3",),
    ),
    Adapter(
        timm_mlp.GluMlp,
        FastGluMlp,
        "feed_forward",
        refuse=_convolutional,
        fingerprints=("a1f7eb4d737d9710",),
    ),
    Adapter(timm_mlp.SwiGLU, FastSwiGLU, "feed_forward", fingerprints=("472ea75516e67988",)),
    Adapter(vision_transformer.Block, FastBlock, "layer", fingerprints=("6aff0b2625c6b457",)),
    Adapter(eva.EvaBlock, FastEvaBlock, "layer", fingerprints=("6105beb4b4817aa5",)),
    Adapter(beit.Block, FastBeitBlock, "layer", fingerprints=("217fc69e68410719",)),
)
