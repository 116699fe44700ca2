"""Patches from images and back: forward and explicit backward of patch_embed and patch_unembed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arithmetic import arithmetic_dtype, nothing


def grid_of(images: Tensor, weight: Tensor) -> list[int]:
    """Patches along each axis, (T,) H, W, floored as a convolution does."""
    return [n // p for n, p in zip(images.shape[2:], weight.shape[2:], strict=True)]


def cut(pixels: Tensor, patch: torch.Size) -> Tensor:
    """Images ``[B, C, (T,) H, W]`` to patch rows ``[B, N, C * (Pt *) Ph * Pw]``.

    A row's order is that of a convolution's weight; margins that fill no patch are left out.
    """
    axes = len(patch)
    for axis, p in enumerate(patch):
        dim = 2 + axis
        pixels = pixels.narrow(dim, 0, pixels.shape[dim] // p * p)
    for axis, p in enumerate(patch):
        pixels = pixels.unflatten(2 + 2 * axis, (-1, p))
    grid_dims = [2 + 2 * axis for axis in range(axes)]
    patch_dims = [3 + 2 * axis for axis in range(axes)]
    pixels = pixels.permute(0, *grid_dims, 1, *patch_dims)
    return pixels.flatten(1, axes).flatten(2)


def paste(rows: Tensor, channels: int, patch: torch.Size, grid: list[int]) -> Tensor:
    """The inverse of ``cut``: patch rows to ``[B, C, (T,) H, W]``."""
    axes = len(patch)
    rows = rows.unflatten(2, (channels, *patch)).unflatten(1, grid)
    order = [0, 1 + axes]
    for axis in range(axes):
        order += [1 + axis, 2 + axes + axis]
    rows = rows.permute(order)
    for axis in range(axes):
        rows = rows.flatten(2 + axis, 3 + axis)
    return rows


def _channelwise(x: Tensor, axes: int) -> Tensor:
    return x.view(1, -1, *[1] * axes)


def normalised_pixels(
    images: Tensor, weight: Tensor, mean: Tensor | None, std: Tensor | None, work: torch.dtype
) -> Tensor:
    """Images scaled to 0..1 (uint8) and normalised, in the weight's dtype.

    Float64 arithmetic, the truth, rounds nothing.
    """
    axes = images.dim() - 2
    wide = torch.float64 if work == torch.float64 else torch.float32
    x = images.to(wide)
    if images.dtype == torch.uint8:
        x = x / 255
    if mean is not None:
        x = x - _channelwise(mean.to(wide), axes)
    if std is not None:
        x = x / _channelwise(std.to(wide), axes)
    return x if wide == torch.float64 else x.to(weight.dtype)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    *,
    arithmetic: torch.dtype | None = None,
) -> Tensor:
    """Patches times weight, plus bias and position; prefix tokens, without position, before."""
    work = arithmetic or arithmetic_dtype(weight.dtype)
    rows = cut(normalised_pixels(images, weight, mean, std, work).to(work), weight.shape[2:])
    tokens = rows @ weight.to(work).flatten(1).mT
    if bias is not None:
        tokens = tokens + bias.to(work)
    if pos_embed is not None:
        tokens = tokens + pos_embed.to(work)
    if prefix is not None:
        tokens = torch.cat((prefix.to(work).expand(tokens.shape[0], -1, -1), tokens), dim=1)
    return tokens.to(weight.dtype)


def patch_embed_backward(
    grad_out: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    images_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of images and weight, and ``grad_out`` summed over the batch.

    From that sum those of bias, position and prefix follow.
    """
    work = arithmetic_dtype(weight.dtype)
    patch, grid = weight.shape[2:], grid_of(images, weight)
    tokens = 1
    for n in grid:
        tokens *= n
    grad = grad_out.to(work)
    grad_tokens = grad[:, grad.shape[1] - tokens :]
    grad_images = grad_weight = nothing(weight)
    if weight_grad:
        rows = cut(normalised_pixels(images, weight, mean, std, work).to(work), patch)
        grad_weight = (
            (grad_tokens.flatten(0, 1).mT @ rows.flatten(0, 1)).view(weight.shape).to(weight.dtype)
        )
    if images_grad:
        covered = paste(grad_tokens @ weight.to(work).flatten(1), weight.shape[1], patch, grid)
        if std is not None:
            covered = covered / _channelwise(std.to(work), len(patch))
        margins = []
        for have, want in zip(reversed(covered.shape[2:]), reversed(images.shape[2:]), strict=True):
            margins += [0, want - have]
        grad_images = F.pad(covered, margins).to(images.dtype).contiguous()
    return grad_images, grad_weight, grad.sum(0)


def patch_unembed(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid_h: int,
    grid_w: int,
    *,
    arithmetic: torch.dtype | None = None,
) -> Tensor:
    """The transposed convolution with stride = kernel.

    Every token times weight becomes a patch of the image.
    """
    work = arithmetic or arithmetic_dtype(tokens.dtype)
    rows = tokens.to(work) @ weight.to(work).flatten(1)
    images = paste(rows, weight.shape[1], weight.shape[2:], [grid_h, grid_w])
    if bias is not None:
        images = images + _channelwise(bias.to(work), 2)
    return images.to(tokens.dtype).contiguous()


def patch_unembed_backward(
    grad_images: Tensor, tokens: Tensor, weight: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, weight and bias."""
    work = arithmetic_dtype(tokens.dtype)
    rows = cut(grad_images.to(work), weight.shape[2:])
    grad_tokens = (rows @ weight.to(work).flatten(1).mT).to(tokens.dtype)
    grad_weight = (
        (tokens.to(work).flatten(0, 1).mT @ rows.flatten(0, 1)).view(weight.shape).to(weight.dtype)
    )
    grad_bias = (
        grad_images.to(work).sum((0, 2, 3)).to(weight.dtype) if bias_grad else nothing(weight)
    )
    return grad_tokens, grad_weight, grad_bias
