"""Patches and token rows: the three products that patch_embed and patch_unembed are made of.

With `pixels` the patches of an image as a matrix [M, K] (M = B * N patches, K = C * Pt * Ph * Pw)
that is never written down, `tokens` [M, E] and `weight` [E, K]:

* `_pixels_to_rows_kernel`: tokens = pixels weight^T (+ bias, position, prefix tokens before). One
  program owns BLOCK_M patches and BLOCK_E features; neighbours share the patches, which come from
  memory once.
* `_rows_to_pixels_kernel`: pixels = tokens weight (+ bias), stored where they belong in the image.
* `_weight_grad_kernel`: tokens^T pixels. One program owns a tile of the weight and a share of the
  patches; the shares are added in order by `sum_shares`.

Here stand their configurations, the geometry that they share, and their launchers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from .configs import BLACKWELL, HALF, IEEE, TF32, Row, Table, kind_of
from .launch import capability, dot_precision, empty, launch, multiprocessors, vector
from .patches_kernels import _pixels_to_rows_kernel, _rows_to_pixels_kernel, _weight_grad_kernel
from .sums import sum_shares


@dataclass(frozen=True)
class PatchConfig:
    """Patches, columns and contraction of a tile, warps, loads in flight."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# d: the tokens' features; n: K.
PATCHES: Table[PatchConfig] = Table(
    "patches",
    Row(
        PatchConfig(64, 64, 16, 8, 1),
        "IEEE runs on the plain cores: four warps spill",
        kinds=(IEEE,),
    ),
    Row(
        PatchConfig(128, 128, 64, 8, 3),
        "expected: the usual tile of a 16-bit product",
        kinds=(HALF,),
        chips=(90, 100, 103),
    ),
    Row(
        PatchConfig(128, 128, 32, 8, 3),
        "static: 172 registers; a contraction of 64 spills where pixels are float32",
        kinds=(HALF,),
        chips=(80,),
    ),
    Row(
        PatchConfig(64, 64, 32, 4, 3),
        "TF32: static, no spill; 128 columns spill on sm_100",
        kinds=(TF32,),
        chips=BLACKWELL,
    ),
    Row(PatchConfig(64, 128, 32, 4, 3), "safe everywhere: 49 KiB of shared memory in TF32"),
)


class Patches:
    """The geometry of an image cut by a weight: arguments and constants of the three kernels."""

    def __init__(self, images: torch.Tensor, weight: torch.Tensor) -> None:
        """images [B, C, (T,) H, W], weight [E, C, (Pt,) Ph, Pw]."""
        frames = images.dim() == 5
        stride_b, stride_c, *rest = images.stride()
        stride_t, stride_h, stride_w = rest if frames else (0, *rest)
        patch = tuple(weight.shape[2:]) if frames else (1, *weight.shape[2:])
        space = tuple(images.shape[2:]) if frames else (1, *images.shape[2:])
        self.grid = tuple(n // p for n, p in zip(space, patch, strict=True))
        self.exact = all(n % p == 0 for n, p in zip(space, patch, strict=True))
        self.tokens = self.grid[0] * self.grid[1] * self.grid[2]
        self.patches = images.shape[0] * self.tokens
        self.embed = weight.shape[0]
        self.k = weight[0].numel()
        unit = stride_w == 1
        vec = vector(images.element_size(), stride_b, stride_c, stride_t, stride_h) if unit else 1
        self.arguments = (
            stride_b // vec,
            stride_c // vec,
            stride_t // vec,
            stride_h // vec,
            stride_w,
            *self.grid,
            self.patches,
        )
        self.precision = dot_precision(weight.dtype)
        self.constants: dict[str, Any] = {
            "EMBED": self.embed,
            "K": self.k,
            "PT": patch[0],
            "PH": patch[1],
            "PW": patch[2],
            "VEC": vec,
            "UNIT": unit,
            "PRECISION": self.precision,
        }
        chip = capability(weight)
        self.config = PATCHES.choose(
            chip, kind_of(weight.dtype, self.precision), self.embed, self.k
        )
        config = self.config
        self.blocks = {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }


def pixels_to_rows(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    pos_embed: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, prefix tokens + N, E] in the weight's dtype."""
    cut = Patches(images, weight)
    before = 0 if prefix is None else prefix.shape[0]
    batches = images.shape[0]
    out = empty(weight, batches, before + cut.tokens, cut.embed)
    if out.numel() == 0:
        return out
    tiles_e = triton.cdiv(cut.embed, cut.config.block_n)
    tiles = triton.cdiv(cut.patches, cut.config.block_m)
    prefix_tiles = triton.cdiv(batches * before, cut.config.block_m)
    launch(
        _pixels_to_rows_kernel,
        (tiles_e * (tiles + prefix_tiles),),
        (
            images,
            weight,
            bias,
            pos_embed,
            prefix,
            mean,
            std,
            out,
            *cut.arguments,
            cut.tokens,
            before,
            tiles_e,
            tiles,
        ),
        **cut.constants,
        **cut.blocks,
        BYTES=images.dtype is torch.uint8,
    )
    return out


def rows_to_pixels(
    rows: torch.Tensor,
    weight: torch.Tensor,
    images: torch.Tensor,
    bias: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fills `images` [B, C, (T,) H, W] from rows [B, N, E]; margins that no patch covers stay."""
    cut = Patches(images, weight)
    if rows.numel() == 0:
        return images
    tiles_k = triton.cdiv(cut.k, cut.config.block_n)
    strides, row_vec = row_strides(rows)
    launch(
        _rows_to_pixels_kernel,
        (tiles_k * triton.cdiv(cut.patches, cut.config.block_m),),
        (rows, weight, bias, std, images, *cut.arguments, cut.tokens, *strides, tiles_k),
        **cut.constants,
        **cut.blocks,
        ROW_VEC=row_vec,
    )
    return images


def weight_gradient(
    rows: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> torch.Tensor:
    """rows [B, N, E] transposed times the patches of images, in the weight's shape and dtype."""
    cut = Patches(images, weight)
    grad_weight = empty(weight, *weight.shape)
    if rows.numel() == 0:
        return grad_weight.zero_()
    tiles_e = triton.cdiv(cut.embed, cut.config.block_m)
    tiles_k = triton.cdiv(cut.k, cut.config.block_n)
    fill = triton.cdiv(2 * multiprocessors(weight.device.index), tiles_e * tiles_k)
    shares = min(fill, triton.cdiv(cut.patches, 4 * cut.config.block_k))
    partial = grad_weight
    if shares > 1:
        partial = empty(weight, shares, *weight.shape, dtype=torch.float32)
    strides, row_vec = row_strides(rows)
    launch(
        _weight_grad_kernel,
        (tiles_e * tiles_k * shares,),
        (
            rows,
            images,
            mean,
            std,
            partial,
            *cut.arguments,
            cut.tokens,
            *strides,
            tiles_e,
            tiles_k,
            shares,
        ),
        **cut.constants,
        **cut.blocks,
        ROW_VEC=row_vec,
        BYTES=images.dtype is torch.uint8,
    )
    return sum_shares(partial, grad_weight) if shares > 1 else grad_weight


def row_strides(rows: torch.Tensor) -> tuple[tuple[int, int], int]:
    stride_b, stride_n, _ = rows.stride()
    vec = vector(rows.element_size(), stride_b, stride_n)
    return (stride_b // vec, stride_n // vec), vec
