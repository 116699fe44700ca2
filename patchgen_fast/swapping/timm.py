"""Adapters for timm.

Every class is known by its exact source (`fingerprints`): a release that changes a class is
refused for that class, with the reason, until its adapter was tested against it.
"""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from timm.layers import attention, mlp, patch_embed
from timm.layers import attention_pool as pools
from timm.layers import attention_pool2d as pools2d
from timm.models import (
    beit,
    cait,
    crossvit,
    eva,
    levit,
    maxxvit,
    naflexvit,
    twins,
    vision_transformer,
    volo,
    xcit,
)
from timm.models import swin_transformer as swin
from timm.models import swin_transformer_v2 as swin_v2
from timm.models import swin_transformer_v2_cr as swin_v2_cr
from timm.models import vision_transformer_relpos as relpos
from timm.models import vision_transformer_sam as sam
from torch import Tensor, nn

from ..modules.attention import project_and_drop
from ..modules.feed_forward import FusedFeedForward
from ..modules.fused import (
    ACTIVATION_TYPES,
    DROP_TYPES,
    IN_PLACE,
    NORM_TYPES,
    inactive,
    project,
    quick_gelu_,
    takes_residual,
)
from ..modules.patch_conv import FastPatchConv2d
from ..modules.patch_embed import FusedPatchEmbed
from ..modules.state import FastLayer
from .adapters import Adapter, Kind, Reason, not_a_patch_conv
from .timm_attention import (
    FastAttention,
    FastAttentionRope,
    FastBeitAttention,
    FastEvaAttention,
)
from .timm_blocks import (
    FastBeitBlock,
    FastBlock,
    FastEvaBlock,
    FastRelPosBlock,
    FastSwinTransformerBlock,
)
from .timm_pools import (
    FastAttentionPool2d,
    FastAttentionPoolLatent,
    FastAttentionPoolPrr,
    FastClassAttention,
    FastClassAttn,
    FastCrossAttention,
    FastRotAttentionPool2d,
)
from .timm_windows import (
    FastAttention2d,
    FastAttentionCl,
    FastRelPosAttention,
    FastSamAttention,
    FastWindowAttention,
    FastWindowAttentionV2,
    FastWindowMultiHeadAttention,
)

NORM_TYPES[timm.layers.LayerNorm] = "layer"
NORM_TYPES[timm.layers.RmsNorm] = "rms"
DROP_TYPES[timm.layers.DropPath] = "drop_prob"
ACTIVATION_TYPES[timm.layers.GELU] = "gelu"
ACTIVATION_TYPES[timm.layers.GELUTanh] = "gelu_tanh"
ACTIVATION_TYPES[timm.layers.Swish] = "silu"
IN_PLACE[timm.layers.QuickGELU] = quick_gelu_


# ----------------------------------------------------------------------- patch embed, feed-forward


class FastPatchEmbed(FusedPatchEmbed, patch_embed.PatchEmbed):
    """timm's `PatchEmbed` by its op."""


class FastPatchEmbedWithSize(FusedPatchEmbed, patch_embed.PatchEmbedWithSize):
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
class FastMlp(FusedFeedForward, mlp.Mlp):
    """timm's `Mlp` with activation and residual in its products."""


@takes_residual
class FastGluMlp(FastLayer, mlp.GluMlp):
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
class FastSwiGLU(FastLayer, mlp.SwiGLU):
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


def _not_plain(module: Any) -> Reason | None:
    """Learned mixing or an unknown position bias between the products."""
    rel_pos = getattr(module, "rel_pos", None)
    if rel_pos is not None and not hasattr(rel_pos, "get_bias"):
        return Reason("position_bias", f"its {type(rel_pos).__name__} gives no bias to add")
    return None


def _known(source: type, target: type, kind: Kind, print_: str, refuse: Any = None) -> Adapter:
    return Adapter(source, target, kind, refuse=refuse, fingerprints=(print_,))


# fingerprints: of timm 1.0.31
ADAPTERS = (
    _known(attention.Attention, FastAttention, "attention", "9573bf9a33297196"),
    _known(attention.AttentionRope, FastAttentionRope, "attention", "4c0743825fe6f463"),
    _known(eva.EvaAttention, FastEvaAttention, "attention", "8eca3860060d5650"),
    _known(beit.Attention, FastBeitAttention, "attention", "1eb62a7b3361ce54"),
    _known(
        relpos.RelPosAttention, FastRelPosAttention, "attention", "957dd848ea54e53e", _not_plain
    ),
    _known(swin.WindowAttention, FastWindowAttention, "attention", "08fa76e8423c0778"),
    _known(swin_v2.WindowAttention, FastWindowAttentionV2, "attention", "7b60f0fa56497d1b"),
    _known(
        swin_v2_cr.WindowMultiHeadAttention,
        FastWindowMultiHeadAttention,
        "attention",
        "264826097c02a6bd",
    ),
    _known(maxxvit.AttentionCl, FastAttentionCl, "attention", "cdebc46ddd790a7e", _not_plain),
    _known(maxxvit.Attention2d, FastAttention2d, "attention", "bcaff2304236b66f", _not_plain),
    _known(sam.Attention, FastSamAttention, "attention", "937a94c37e27af5a"),
    _known(cait.ClassAttn, FastClassAttn, "attention", "9fa3c797deb454fc"),
    _known(volo.ClassAttention, FastClassAttention, "attention", "53f24c49d1cdd592"),
    _known(crossvit.CrossAttention, FastCrossAttention, "attention", "b0fb058a6763011b"),
    _known(pools.AttentionPoolLatent, FastAttentionPoolLatent, "attention", "252014c8ea5e4c4c"),
    _known(pools.AttentionPoolPrr, FastAttentionPoolPrr, "attention", "002f698d3904d131"),
    _known(pools2d.AttentionPool2d, FastAttentionPool2d, "attention", "2e57ee44bd75eebc"),
    _known(pools2d.RotAttentionPool2d, FastRotAttentionPool2d, "attention", "88a05e4a000c65cd"),
    _known(patch_embed.PatchEmbed, FastPatchEmbed, "patch_embed", "cee1bba5150c1f42"),
    _known(
        patch_embed.PatchEmbedWithSize, FastPatchEmbedWithSize, "patch_embed", "2e855cd8d039773f"
    ),
    _known(mlp.Mlp, FastMlp, "feed_forward", "0b402fa7d2a6c5a3", _convolutional),
    _known(mlp.GluMlp, FastGluMlp, "feed_forward", "a1f7eb4d737d9710", _convolutional),
    _known(mlp.SwiGLU, FastSwiGLU, "feed_forward", "472ea75516e67988"),
    _known(vision_transformer.Block, FastBlock, "layer", "6aff0b2625c6b457"),
    _known(eva.EvaBlock, FastEvaBlock, "layer", "6105beb4b4817aa5"),
    _known(beit.Block, FastBeitBlock, "layer", "217fc69e68410719"),
    _known(relpos.RelPosBlock, FastRelPosBlock, "layer", "25c05366ecc68d04"),
    _known(swin.SwinTransformerBlock, FastSwinTransformerBlock, "layer", "947d35a3e65ea966"),
)

_CONV = {"proj": Adapter(nn.Conv2d, FastPatchConv2d, "patch_embed", refuse=not_a_patch_conv)}

PARTS = {
    cls: _CONV
    for cls in (
        crossvit.PatchEmbed,
        naflexvit.NaFlexEmbeds,
        swin_v2_cr.PatchEmbed,
        twins.PatchEmbed,
        volo.PatchEmbed,
    )
}

_MIXES = "it mixes the weights of its heads, which a fused kernel never makes"
_OVER_CHANNELS = "it attends over channels, not tokens"
_OUTLOOK = "its weights are made by a projection, not by queries and keys"

UNSUPPORTED = {
    cait.TalkingHeadAttn: Reason("talking_heads", _MIXES),
    levit.Attention: Reason("batch_norm", "its projections are followed by batch normalisations"),
    volo.OutlookAttention: Reason("outlook", _OUTLOOK),
    xcit.XCA: Reason("over_channels", _OVER_CHANNELS),
}
