"""Patch embedding and its inverse around the fused ops: one pass from pixels to tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers import PatchUnembed as EagerPatchUnembed
from ..models.patches import Size2d, pair
from ..models.pixels import PixelStatistics
from ..ops.patch_embed import patch_embed
from ..ops.patch_unembed import patch_unembed
from ..registry import autocasts
from .fused import inactive, plain_patch_conv
from .state import FastLayer, LayerState

FORMATS = ("NCHW", "NHWC", "NCL", "NLC")


class FusedPatchEmbed(FastLayer):
    """Forward for any class with timm's names: `proj`, `norm`, `img_size`, `patch_size`,
    `flatten`, `output_fmt`, `strict_img_size`, `dynamic_img_pad`.
    """

    proj: Any
    norm: Any
    img_size: tuple[int, int] | None
    patch_size: tuple[int, int]
    flatten: bool
    output_fmt: str
    strict_img_size: bool
    dynamic_img_pad: bool

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to tokens `[B, N, E]`, or to the layout of `output_fmt`."""
        self._count_call()
        self._check(x)
        if self.dynamic_img_pad:
            below, right = ((-x.shape[i]) % self.patch_size[i - 2] for i in (2, 3))
            x = F.pad(x, (0, right, 0, below))
        grid = (x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1])
        tokens = self._embed(x)
        if not self.flatten:
            tokens = in_format(
                tokens, grid, str(getattr(self.output_fmt, "value", self.output_fmt))
            )
        return tokens if inactive(self.norm) else self.norm(tokens)

    def _embed(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, E]` of images that whole patches fill."""
        if not plain_patch_conv(self.proj):
            self._count_fallback("proj_called")
            return self.proj(x).flatten(2).transpose(1, 2)
        weight: Tensor = self.proj.weight
        if x.dtype != weight.dtype and not autocasts(x):
            # The op would convert and so hide a mistake that a convolution reports.
            raise TypeError(
                f"expected images in the weight's dtype {weight.dtype}, got {x.dtype}; "
                "convert the images, or run under torch.autocast"
            )
        return patch_embed(x, weight, self.proj.bias, backend=self._fast.backend)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4:
            raise ValueError(
                f"expected images [B, C, H, W], got shape {tuple(x.shape)}; "
                "add the missing dimension with images[None]"
            )
        if self.img_size is None:
            return
        size = (x.shape[2], x.shape[3])
        if self.strict_img_size and size != tuple(self.img_size):
            raise ValueError(
                f"expected images of {self.img_size[0]} x {self.img_size[1]}, got "
                f"{size[0]} x {size[1]}; resize them, call set_input_size, or build the layer "
                "with strict_img_size=False"
            )
        if self.strict_img_size or self.dynamic_img_pad:
            return
        if any(side % patch for side, patch in zip(size, self.patch_size, strict=True)):
            raise ValueError(
                f"expected sides that are multiples of the patch {self.patch_size}, got {size}; "
                "crop or resize the images, or build the layer with dynamic_img_pad=True"
            )


def in_format(tokens: Tensor, grid: tuple[int, int], output_fmt: str) -> Tensor:
    """Tokens `[B, N, E]` of a grid as NLC, NCL, NHWC or NCHW; all are views."""
    if output_fmt == "NLC":
        return tokens
    if output_fmt == "NCL":
        return tokens.transpose(1, 2)
    if output_fmt == "NHWC":
        return tokens.unflatten(1, grid)
    return tokens.transpose(1, 2).unflatten(2, grid)


class FusedPatchUnembed(FastLayer):
    """Forward of a patch unembedding with `proj`, a transposed convolution, and `grid_for`."""

    proj: Any
    grid_for: Callable[[Tensor, Size2d | None], tuple[int, int]]

    def forward(self, tokens: Tensor, grid_size: Size2d | None = None) -> Tensor:
        """Tokens `[B, N, E]` to images `[B, C, rows * P_h, columns * P_w]`."""
        self._count_call()
        grid = self.grid_for(tokens, grid_size)
        if not plain_patch_conv(self.proj):
            self._count_fallback("proj_called")
            return self.proj(tokens.transpose(1, 2).unflatten(2, grid))
        return patch_unembed(
            tokens,
            self.proj.weight,
            self.proj.bias,
            grid_size=grid,
            backend=self._backend("patch_unembed"),
        )


def embed_pixels(
    layer: Any, images: Tensor, *, pos_embed: Tensor | None, prefix: Tensor | None
) -> Tensor:
    """Tokens `[B, P + N, E]` straight from pixels: normalise, project, positions, prefix.

    `layer` is a fast layer with `proj` and the statistics of `PixelStatistics`.
    """
    proj = layer.proj
    if plain_patch_conv(proj):
        return patch_embed(
            images,
            proj.weight,
            proj.bias,
            pos_embed=pos_embed,
            prefix=prefix,
            mean=layer.mean,
            std=layer.std,
            backend=layer._fast.backend,
        )
    layer._count_fallback("proj_called")
    tokens = proj(layer.normalise(images, proj.weight.dtype)).flatten(2).transpose(1, 2)
    if pos_embed is not None:
        tokens = tokens + pos_embed
    if prefix is not None:
        tokens = torch.cat((prefix.expand(len(tokens), -1, -1), tokens), dim=1)
    return tokens


class PatchEmbed(FusedPatchEmbed, PixelStatistics):
    """Images `[B, C, H, W]` to tokens `[B, N, E]`, fast; parameters under `proj`.

    Arguments and meaning as in timm's `PatchEmbed`, whose weights load; `mean` and `std` besides.

    Args:
        img_size: side or (height, width) of the images; None takes any.
        patch_size: side or (height, width) of a patch.
        in_chans: C.
        embed_dim: E.
        norm_layer: class of a normalisation of the tokens, or None.
        flatten: give tokens `[B, N, E]`; False gives maps `[B, E, rows, columns]`.
        output_fmt: "NLC", "NCL", "NHWC" or "NCHW" instead of `flatten`.
        bias: of the projection.
        strict_img_size: refuse images of another size.
        dynamic_img_pad: pad images below and right to whole patches.
        mean, std: a number per channel on the scale 0 to 1: images are normalised by them in
            float32. uint8 images are divided by 255 first.
        backend: None for the fastest, or a backend by name.

    Raises:
        ValueError: an unknown format or backend; at a call, images of another shape.
    """

    def __init__(
        self,
        img_size: Size2d | None = 224,
        patch_size: Size2d = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if output_fmt is not None and output_fmt not in FORMATS:
            raise ValueError(f"expected output_fmt None or one of {FORMATS}, got {output_fmt!r}")
        kind = {"device": device, "dtype": dtype}
        self.patch_size = pair(patch_size)
        self._set_img_size(img_size)
        self.flatten = flatten and output_fmt is None
        self.output_fmt = output_fmt or "NCHW"
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.proj = nn.Conv2d(
            in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, **kind
        )
        self.norm = norm_layer(embed_dim, **kind) if norm_layer else nn.Identity()
        self.set_statistics(in_chans, mean, std)
        if device is not None:
            self.to(device)  # the statistics too
        self._fast = LayerState(backend)

    def _set_img_size(self, img_size: Size2d | None) -> None:
        self.img_size = None if img_size is None else pair(img_size)
        self.grid_size = None if self.img_size is None else self.dynamic_feat_size(self.img_size)
        self.num_patches = None if self.grid_size is None else self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image of this size."""
        if getattr(self, "dynamic_img_pad", False):
            return (
                math.ceil(img_size[0] / self.patch_size[0]),
                math.ceil(img_size[1] / self.patch_size[1]),
            )
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels a patch: the longer side, or (height, width)."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def set_input_size(
        self, img_size: Size2d | None = None, patch_size: Size2d | None = None
    ) -> None:
        """Take images of another size, or patches of another size with resampled weights.

        New weights give resized patches the tokens that the old ones gave the originals, as well
        as a linear map can (Beyer et al., 2022, FlexiViT, arXiv:2212.08013).
        """
        if patch_size is not None and pair(patch_size) != self.patch_size:
            self.patch_size = pair(patch_size)
            self.proj = resized_projection(self.proj, self.patch_size)
        self._set_img_size(self.img_size if img_size is None else img_size)

    def forward(
        self, x: Tensor, *, pos_embed: Tensor | None = None, prefix: Tensor | None = None
    ) -> Tensor:
        """Images, float or uint8, to tokens.

        Args:
            x: `[B, C, H, W]`.
            pos_embed: `[N, E]` or `[1, N, E]`, added to the patches.
            prefix: `[P, E]` or `[1, P, E]`, tokens before the patches, without position.
        """
        if pos_embed is None and prefix is None:
            return super().forward(x)
        if not self.flatten or not inactive(self.norm) or self.dynamic_img_pad:
            raise ValueError(
                "expected flatten=True, no norm_layer and no dynamic_img_pad with pos_embed or "
                "prefix; add them to the layer's result instead"
            )
        self._count_call()
        self._check(x)
        return self._embed(x, pos_embed, prefix)

    def _embed(
        self, x: Tensor, pos_embed: Tensor | None = None, prefix: Tensor | None = None
    ) -> Tensor:
        return embed_pixels(self, x, pos_embed=pos_embed, prefix=prefix)


def resized_projection(proj: nn.Conv2d, patch_size: tuple[int, int]) -> nn.Conv2d:
    """A patch projection for another patch size, by the pseudo-inverse of bicubic resizing."""
    old = proj.kernel_size
    basis = torch.eye(old[0] * old[1], dtype=torch.float64).reshape(-1, 1, *old)
    resize = F.interpolate(basis, size=patch_size, mode="bicubic", antialias=True)
    matrix = torch.linalg.pinv(resize.flatten(1)).to(proj.weight.device)  # [new, old]
    new = nn.Conv2d(
        proj.in_channels,
        proj.out_channels,
        patch_size,
        patch_size,
        bias=proj.bias is not None,
        device=proj.weight.device,
        dtype=proj.weight.dtype,
    )
    with torch.no_grad():
        weight = proj.weight.double().flatten(2) @ matrix.T
        new.weight.copy_(weight.unflatten(2, patch_size))
        if proj.bias is not None and new.bias is not None:
            new.bias.copy_(proj.bias)
    new.weight.requires_grad_(proj.weight.requires_grad)
    return new.train(proj.training)


class PatchUnembed(FusedPatchUnembed, EagerPatchUnembed):
    """Tokens `[B, N, E]` to images `[B, C, H, W]`, fast; parameters under `proj`.

    Args:
        grid_size: rows and columns of patches.
        patch_size: side or (height, width) of a patch.
        out_chans: C.
        embed_dim: E.
        bias: of the projection.
        backend: None for the fastest, or a backend by name.

    Raises:
        ValueError: an unknown backend; at a call, tokens that do not fill the grid.
    """

    def __init__(
        self,
        grid_size: Size2d,
        patch_size: Size2d = 16,
        out_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(grid_size, patch_size, out_chans, embed_dim, bias)
        self._fast = LayerState(backend)
