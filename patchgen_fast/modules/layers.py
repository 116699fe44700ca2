"""Encoder and decoder layers: residuals go into the products before them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..models.cache import LayerCache
from .attention import Attention, CrossAttention
from .branch import DropPath, LayerScale
from .feed_forward import FeedForward
from .fused import (
    add_branch_then_norm,
    add_then_norm,
    add_to_residual,
    child,
    inactive,
    normalise,
)
from .state import FastLayer, LayerState


class FusedEncoderLayer(FastLayer):
    """Forward of a pre-norm encoder layer with `norm1`, `attn`, `norm2`, `mlp`, and perhaps `ls1`,
    `ls2`, `drop_path1`, `drop_path2` on the branches.
    """

    norm1: Any
    attn: Any
    norm2: Any
    mlp: Any

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens `[B, N, E]` to `[B, N, E]`; the mask as in `Attention`."""
        self._count_call()
        normalised = normalise(self, x, self.norm1)
        if self._bare(1):
            x, normalised = add_branch_then_norm(
                self, x, self.attn, self.norm2, normalised, attn_mask, is_causal
            )
        else:
            branch = self._shaped(1, self.attn(normalised, attn_mask, is_causal))
            x, normalised = add_then_norm(self, x, branch, self.norm2)
        if self._bare(2):
            return add_to_residual(x, self.mlp, normalised)
        return x + self._shaped(2, self.mlp(normalised))

    def _on_branch(self, branch: int) -> list[Any]:
        """The layer scale and the stochastic depth of a branch, where the layer has them."""
        children = (child(self, f"ls{branch}"), child(self, f"drop_path{branch}"))
        return [module for module in children if module is not None]

    def _bare(self, branch: int) -> bool:
        """Whether the branch goes into its sum as it is, so that its last product may add."""
        return all(inactive(module) for module in self._on_branch(branch))

    def _shaped(self, branch: int, x: Tensor) -> Tensor:
        for module in self._on_branch(branch):
            x = module(x)
        return x


class FusedDecoderLayer(FastLayer):
    """Forward of a pre-norm decoder layer with `norm1`, `attn`, `norm2`, `cross_attn`, `norm3`,
    `mlp`.
    """

    norm1: Any
    attn: Any
    norm2: Any
    cross_attn: Any
    norm3: Any
    mlp: Any

    def forward(self, x: Tensor, memory: Tensor, *, cache: LayerCache | None = None) -> Tensor:
        """Tokens `[B, N, E]` and memory `[B, M, memory_dim]` to `[B, N, E]`.

        Every token sees itself, those before it, and the memory. With a cache, x are the tokens
        that follow those already decoded.
        """
        self._count_call()
        own, of_memory = (None, None) if cache is None else cache
        normalised = normalise(self, x, self.norm1)
        x, normalised = add_branch_then_norm(
            self, x, self.attn, self.norm2, normalised, is_causal=True, cache=own
        )
        x, normalised = add_branch_then_norm(
            self, x, self.cross_attn, self.norm3, normalised, memory, cache=of_memory
        )
        return add_to_residual(x, self.mlp, normalised)


class EncoderLayer(FusedEncoderLayer, nn.Module):
    """Self-attention, then feed-forward, each on normalised tokens and added to its input.

    Parameters `norm1`, `attn`, `norm2`, `mlp`, and `ls1`, `ls2` with layer scale; arguments as in
    timm's `Block`, whose weights load.

    Args:
        dim: E of the tokens.
        num_heads: H.
        mlp_ratio: hidden features of the feed-forward part over dim.
        qkv_bias, qk_norm, scale_attn_norm, attn_drop: as `scale_norm` and the others in
            `Attention`.
        scale_mlp_norm: normalise the hidden features.
        proj_bias: biases of the output projection and of the feed-forward part.
        proj_drop: dropout after the projections, in training.
        init_values: first value of the branches' layer scale; None is no layer scale.
        drop_path: probability of leaving a branch out for a sample, in training.
        act_layer: class of the activation.
        norm_layer: class of the normalisations.
        norm_eps: their epsilon.
        backend: None for the fastest, or a backend by name.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
        *,
        norm_eps: float = 1e-6,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend}
        norm_kind: dict[str, Any] = {"device": device, "dtype": dtype, "eps": norm_eps}
        self.norm1 = norm_layer(dim, **norm_kind)
        self.attn = Attention(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            **kind,
        )
        self.norm2 = norm_layer(dim, **norm_kind)
        self.mlp = FeedForward(
            dim,
            int(dim * mlp_ratio),
            act_layer=act_layer,
            norm_layer=norm_layer if scale_mlp_norm else None,
            bias=proj_bias,
            drop=proj_drop,
            **kind,
        )
        for branch in (1, 2):
            if init_values is not None:
                scale = LayerScale(dim, init_values, device=device, dtype=dtype)
                setattr(self, f"ls{branch}", scale)
            if drop_path > 0.0:
                setattr(self, f"drop_path{branch}", DropPath(drop_path))
        self._fast = LayerState(backend)


class DecoderLayer(FusedDecoderLayer, nn.Module):
    """Causal self-attention, cross-attention to a memory, feed-forward; parameters `norm1`,
    `attn`, `norm2`, `cross_attn`, `norm3`, `mlp`.

    Args:
        dim: E of the tokens.
        num_heads: H.
        mlp_ratio, qkv_bias, qk_norm, proj_bias, proj_drop, attn_drop, act_layer, norm_layer,
            norm_eps: as in `EncoderLayer`.
        memory_dim: E of the memory; None is dim.
        backend: None for the fastest, or a backend by name.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
        *,
        memory_dim: int | None = None,
        norm_eps: float = 1e-6,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend}
        heads: dict[str, Any] = {
            "qkv_bias": qkv_bias,
            "qk_norm": qk_norm,
            "proj_bias": proj_bias,
            "attn_drop": attn_drop,
            "proj_drop": proj_drop,
            "norm_layer": norm_layer,
        }
        norm_kind: dict[str, Any] = {"device": device, "dtype": dtype, "eps": norm_eps}
        self.norm1 = norm_layer(dim, **norm_kind)
        self.attn = Attention(dim, num_heads, **heads, **kind)
        self.norm2 = norm_layer(dim, **norm_kind)
        self.cross_attn = CrossAttention(dim, num_heads, memory_dim=memory_dim, **heads, **kind)
        self.norm3 = norm_layer(dim, **norm_kind)
        self.mlp = FeedForward(
            dim,
            int(dim * mlp_ratio),
            act_layer=act_layer,
            bias=proj_bias,
            drop=proj_drop,
            **kind,
        )
        self._fast = LayerState(backend)
