"""timm's transformer blocks: sums go into the products before them, or into the normalisation.

`timm.py` holds the table of adapters.
"""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from timm.models import beit, eva, swin_transformer, vision_transformer, vision_transformer_relpos
from torch import Tensor, nn

from ..modules.fused import (
    add_branch_then_norm,
    add_then_norm,
    add_to_residual,
    inactive,
    is_plain_tensor,
    normalise,
    unobserved,
)
from ..modules.state import FastLayer


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
        normalised = normalise(self, x, self.norm1)
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


class FastRelPosBlock(_FusedBlock, vision_transformer_relpos.RelPosBlock):
    """timm's `RelPosBlock`."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        self._count_call()
        return self._block(x, (self.ls1, self.ls2), shared_rel_pos=shared_rel_pos)


class FastSwinTransformerBlock(FastLayer, swin_transformer.SwinTransformerBlock):
    """timm's Swin block: cutting and joining windows is timm's own."""

    def forward(self, x: Tensor) -> Tensor:
        self._count_call()
        branch = self.drop_path1(self._attn(normalise(self, x, self.norm1)))
        x, normalised = add_then_norm(self, x, branch, self.norm2)
        shape = x.shape
        x, normalised = x.flatten(1, 2), normalised.flatten(1, 2)
        if inactive(self.drop_path2):
            x = add_to_residual(x, self.mlp, normalised)
        else:
            x = x + self.drop_path2(self.mlp(normalised))
        return x.reshape(shape)
