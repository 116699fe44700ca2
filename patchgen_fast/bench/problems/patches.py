"""Patch embedding and its way back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from patchgen_fast.bench import data, peers
from patchgen_fast.bench.cases import Case
from patchgen_fast.bench.limits import gemm_cost
from patchgen_fast.bench.problems.base import (
    COMPILES,
    DTYPE,
    Contender,
    Problem,
    Runnable,
    compiled,
    normal,
    on_leaves,
)
from patchgen_fast.bench.problems.base import generator as random_of

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
Maybe = torch.Tensor | None


def normalised(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 images to `dtype`, as a data pipeline does it; float images as they are."""
    if images.dtype != torch.uint8:
        return images
    work = torch.float64 if dtype == torch.float64 else torch.float32
    each = (1, -1, *[1] * (images.dim() - 2))
    mean = torch.tensor(MEAN, dtype=work, device=images.device).view(each)
    std = torch.tensor(STD, dtype=work, device=images.device).view(each)
    return ((images.to(work) / 255 - mean) / std).to(dtype)


def finish(tokens: torch.Tensor, pos_embed: torch.Tensor, prefix: Maybe) -> torch.Tensor:
    """Add positions, then put the prefix before."""
    tokens = tokens + pos_embed
    if prefix is None:
        return tokens
    return torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)


def conv_embed(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    pos_embed: torch.Tensor,
    prefix: Maybe = None,
    *,
    channels_last: bool = False,
) -> torch.Tensor:
    """The way of timm and most others: convolution, flatten, transpose, position, class token."""
    images = normalised(images, weight.dtype)
    if channels_last:
        images = images.contiguous(memory_format=CHANNELS_LAST[images.dim()])
    convolution = F.conv3d if images.dim() == 5 else F.conv2d
    out = convolution(images, weight, bias, stride=weight.shape[2:])
    return finish(out.flatten(2).transpose(1, 2), pos_embed, prefix)


def to_rows(images: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """[B,C,(T,)H,W] -> [B,N,C·(Pt·)P·P], channels first within a row as in a convolution's weight.

    What does not fill a patch is left out, as a convolution leaves it out.
    """
    batch, channels, *sizes = images.shape
    rank, split = len(sizes), []
    for axis, (size, side) in enumerate(zip(sizes, sides, strict=True), 2):
        images = images.narrow(axis, 0, size // side * side)
        split += [size // side, side]
    grid = images.reshape(batch, channels, *split)
    cells, within = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
    return grid.permute(0, *cells, 1, *within).flatten(rank + 1).flatten(1, rank)


def unfold_embed(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    pos_embed: torch.Tensor,
    prefix: Maybe = None,
) -> torch.Tensor:
    """Patches as rows, then one linear layer."""
    rows = to_rows(normalised(images, weight.dtype), weight.shape[2:])
    return finish(F.linear(rows, weight.flatten(1), bias), pos_embed, prefix)


def exact_embed(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    pos_embed: torch.Tensor,
    prefix: Maybe = None,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The float64 truth; uint8 images are rounded to the weight's dtype first, as the op says."""
    if images.dtype == torch.uint8:
        images = normalised(images, dtype).double()
    rows = to_rows(images, weight.shape[2:])
    return finish(torch.einsum("bnk,ek->bne", rows, weight.flatten(1)) + bias, pos_embed, prefix)


def _images(case: Case, random: torch.Generator, sizes: Sequence[int]) -> tuple[torch.Tensor, str]:
    """[B,C,(T,)H,W], of photographs where three channels allow, and why not where they should be.

    The frames of a video are photographs too, each another.
    """
    batch, channels = case.dims["B"], case.dims["C"]
    uint8, note = bool(case.options.get("uint8")), ""
    if channels == 3:
        frames = sizes[0] if len(sizes) == 3 else 1
        try:
            raw = data.photographs(batch * frames, sizes[-1], seed=case.seed)
        except data.NoImages as missing:
            note = str(missing)
        else:
            raw = raw.view(batch, frames, *raw.shape[1:]).transpose(1, 2)
            raw = raw.reshape(batch, channels, *sizes).contiguous()
            values = raw if uint8 else normalised(raw, torch.float32).to(DTYPE[case.dtype])
            return values.to(case.device), ""
    images = normal(case, random, batch, channels, *sizes)
    if uint8:
        images = (images * 40 + 128).clamp(0, 255).to(torch.uint8)
    return images, note


def patch_embed(case: Case) -> Problem:
    """Images or videos to tokens with bias, positions and prefix."""
    dims = case.dims
    batch, channels, width = dims["B"], dims["C"], dims["E"]
    sides = (*([dims["Pt"]] if "Pt" in dims else []), dims["P"], dims["P"])
    sizes = (*([dims["T"]] if "T" in dims else []), dims["S"], dims["S"])
    random = random_of(case)
    tokens = math.prod(size // side for size, side in zip(sizes, sides, strict=True))
    inner = channels * math.prod(sides)
    uint8 = bool(case.options.get("uint8"))
    prefix = case.options["prefix"]
    images, note = _images(case, random, sizes)
    tensors: dict[str, Maybe] = {
        "images": images,
        "weight": normal(case, random, width, channels, *sides, scale=inner**-0.5),
        "bias": normal(case, random, width),
        "pos_embed": normal(case, random, tokens, width),
        "prefix": normal(case, random, prefix, width) if prefix else None,
    }

    def channels_last() -> Runnable:
        weight = tensors["weight"]
        assert weight is not None
        weight = weight.contiguous(memory_format=CHANNELS_LAST[weight.dim()])
        return on_leaves(partial(conv_embed, channels_last=True), {**tensors, "weight": weight})

    def ours() -> Runnable:
        from patchgen_fast import patch_embed as fast

        extra: dict[str, Any] = {"mean": MEAN, "std": STD} if uint8 else {}
        return on_leaves(partial(fast, backend=case.backend, **extra), tensors)

    rows = batch * tokens
    return Problem(
        [
            Contender("eager", "eager", lambda: on_leaves(conv_embed, tensors)),
            Contender("channels_last conv", "peer", channels_last),
            Contender("unfold + linear", "peer", lambda: on_leaves(unfold_embed, tensors)),
            Contender(
                "torch.compile", "peer", lambda: compiled(conv_embed, tensors), not_quick=COMPILES
            ),
            *peers.patch_embed_peers(case, tensors),
            Contender("ours", "ours", ours),
        ],
        lambda: on_leaves(partial(exact_embed, dtype=DTYPE[case.dtype]), tensors, torch.float64),
        gemm_cost(
            rows,
            inner,
            width,
            case.dtype,
            case.phase,
            input_size=1 if uint8 else None,
            input_grad=not uint8,
        ),
        items=batch,
        note=note,
    )


def conv_unembed(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, grid: int
) -> torch.Tensor:
    """Transposed convolution on the token grid."""
    batch, _, width = tokens.shape
    image = tokens.transpose(1, 2).reshape(batch, width, grid, grid)
    return F.conv_transpose2d(image, weight, bias, stride=weight.shape[-1])


def linear_unembed(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, grid: int
) -> torch.Tensor:
    """One linear layer, then rows back to an image (the way of MAE and DiT)."""
    batch, _, width = tokens.shape
    _, channels, side, _ = weight.shape
    rows = torch.einsum("bne,ek->bnk", tokens, weight.flatten(1))
    image = rows.view(batch, grid, grid, channels, side, side).permute(0, 3, 1, 4, 2, 5)
    image = image.reshape(batch, channels, grid * side, grid * side)
    return image + bias.view(1, -1, 1, 1)


def patch_unembed(case: Case) -> Problem:
    """Tokens [B,N,E] to images."""
    dims = case.dims
    batch, channels, size, side, width = (dims[name] for name in ("B", "C", "S", "P", "E"))
    grid = size // side
    random = random_of(case)
    tensors = {
        "tokens": normal(case, random, batch, grid * grid, width),
        "weight": normal(case, random, width, channels, side, side, scale=width**-0.5),
        "bias": normal(case, random, channels),
    }

    def ours() -> Runnable:
        from patchgen_fast import patch_unembed as fast

        return on_leaves(partial(fast, grid_size=(grid, grid), backend=case.backend), tensors)

    return Problem(
        [
            Contender(
                "eager", "eager", lambda: on_leaves(partial(conv_unembed, grid=grid), tensors)
            ),
            Contender(
                "linear + fold",
                "peer",
                lambda: on_leaves(partial(linear_unembed, grid=grid), tensors),
            ),
            Contender("ours", "ours", ours),
        ],
        lambda: on_leaves(partial(linear_unembed, grid=grid), tensors, torch.float64),
        gemm_cost(batch * grid * grid, width, channels * side * side, case.dtype, case.phase),
        items=batch,
    )
