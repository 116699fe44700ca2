"""Adapters for the patch transformer of `patchgen_fast.models`."""

from __future__ import annotations

from torch import Tensor

from ..models import layers
from ..models.cache import KeyValueCache
from ..modules.attention import FusedAttention, FusedCrossAttention
from ..modules.feed_forward import FusedFeedForward
from ..modules.fused import takes_residual
from ..modules.layers import FusedDecoderLayer, FusedEncoderLayer
from ..modules.patch_embed import FusedPatchUnembed, embed_pixels
from ..modules.state import FastLayer
from .adapters import Adapter


class FastPatchEmbed(FastLayer, layers.PatchEmbed):
    """The patch embedding with normalisation, positions and prefix in one op."""

    def forward(
        self, images: Tensor, *, pos_embed: Tensor | None = None, prefix: Tensor | None = None
    ) -> Tensor:
        self._count_call()
        self.check(images)
        return embed_pixels(self, images, pos_embed=pos_embed, prefix=prefix)


class FastPatchUnembed(FusedPatchUnembed, layers.PatchUnembed):
    """The patch unembedding by its op."""


@takes_residual
class FastAttention(FusedAttention, layers.Attention):
    """Self-attention around the fused core."""

    def fused_forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        layers.check_tokens(x, self.num_heads * self.head_dim)
        return super().fused_forward(x, attn_mask, is_causal, cache=cache, residual=residual)


@takes_residual
class FastCrossAttention(FusedCrossAttention, layers.CrossAttention):
    """Cross-attention around the fused core."""


@takes_residual
class FastFeedForward(FusedFeedForward, layers.FeedForward):
    """Feed-forward with activation and residual in its products."""

    def fused_forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        layers.check_last(x, self.fc1.in_features)
        return super().fused_forward(x, residual=residual)


class FastEncoderLayer(FusedEncoderLayer, layers.EncoderLayer):
    """An encoder layer that hands its residuals to its products."""


class FastDecoderLayer(FusedDecoderLayer, layers.DecoderLayer):
    """A decoder layer that hands its residuals to its products."""


ADAPTERS = (
    Adapter(layers.PatchEmbed, FastPatchEmbed, "patch_embed"),
    Adapter(layers.PatchUnembed, FastPatchUnembed, "patch_embed", op="patch_unembed"),
    Adapter(layers.Attention, FastAttention, "attention"),
    Adapter(layers.CrossAttention, FastCrossAttention, "attention"),
    Adapter(layers.FeedForward, FastFeedForward, "feed_forward"),
    Adapter(layers.EncoderLayer, FastEncoderLayer, "layer"),
    Adapter(layers.DecoderLayer, FastDecoderLayer, "layer"),
)
