"""Images to patches and back: the one place that says what a patch is.

An image is cut into a grid of equal, non-overlapping patches, which are numbered row by row.
Each patch is a small image. The worked example, a 4 x 4 image cut into 2 x 2 patches:

    >>> import torch
    >>> image = torch.arange(1, 17).reshape(1, 1, 4, 4)
    >>> x1, x2, x3, x4 = patchify(image, 2)[0, :, 0]
    >>> x1.tolist(), x2.tolist(), x3.tolist(), x4.tolist()
    ([[1, 2], [5, 6]], [[3, 4], [7, 8]], [[9, 10], [13, 14]], [[11, 12], [15, 16]])

A 256 x 256 image cut into 32 x 32 patches gives 64 of them, a 32 x 32 image cut into 16 x 16
patches gives 4:

    >>> patchify(torch.zeros(1, 3, 256, 256), 32).shape
    torch.Size([1, 64, 3, 32, 32])
    >>> patchify(torch.zeros(1, 3, 32, 32), 16).shape
    torch.Size([1, 4, 3, 16, 16])

`unpatchify` undoes `patchify` exactly:

    >>> torch.equal(unpatchify(patchify(image, 2), (2, 2)), image)
    True

`patches.flatten(2)` gives the vectors of the papers, channel first (c, row, column): the order in
which the weight of an `nn.Conv2d` lies, so a patch embedding is one matrix product with it.
"""

from __future__ import annotations

from torch import Tensor

Size2d = int | tuple[int, int]


def pair(size: Size2d) -> tuple[int, int]:
    """`(height, width)` of a size that may be one number for both."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def grid_of(image_size: Size2d, patch_size: Size2d) -> tuple[int, int]:
    """Rows and columns of patches in an image. ValueError where the patches do not fill it."""
    (height, width), (patch_height, patch_width) = pair(image_size), pair(patch_size)
    if min(patch_height, patch_width) < 1:
        raise ValueError(f"expected a positive patch size, got {(patch_height, patch_width)}")
    if height % patch_height or width % patch_width:
        raise ValueError(
            "expected an image whose sides are multiples of the patch "
            f"{(patch_height, patch_width)}, got {(height, width)}; crop, pad or resize the image, "
            "or choose another patch size"
        )
    return height // patch_height, width // patch_width


def patchify(images: Tensor, patch_size: Size2d) -> Tensor:
    """Cut images `[B, C, H, W]` into patches `[B, N, C, P_h, P_w]`, numbered row by row.

    Any dtype. Raises ValueError where the patches do not fill the image.
    """
    if images.dim() != 4:
        raise ValueError(
            f"expected images [B, C, H, W], got shape {tuple(images.shape)}; "
            "add the missing dimension with images[None]"
        )
    batch, channels, height, width = images.shape
    patch_height, patch_width = pair(patch_size)
    rows, columns = grid_of((height, width), (patch_height, patch_width))
    cut = images.reshape(batch, channels, rows, patch_height, columns, patch_width)
    ordered = cut.permute(0, 2, 4, 1, 3, 5)  # row, column, then the patch itself
    return ordered.reshape(batch, rows * columns, channels, patch_height, patch_width)


def unpatchify(patches: Tensor, grid_size: Size2d) -> Tensor:
    """Put patches `[B, N, C, P_h, P_w]` back into images `[B, C, rows * P_h, columns * P_w]`.

    `grid_size` is `(rows, columns)`; raises ValueError unless rows * columns = N.
    """
    rows, columns = pair(grid_size)
    if patches.dim() != 5:
        raise ValueError(
            f"expected patches [B, N, C, P_h, P_w], got shape {tuple(patches.shape)}; "
            "vectors [B, N, C * P_h * P_w] become patches by unflatten(2, (C, P_h, P_w))"
        )
    batch, count, channels, patch_height, patch_width = patches.shape
    if count != rows * columns:
        raise ValueError(
            f"expected {rows * columns} patches for a grid of {rows} x {columns}, got {count}; "
            "pass the grid that the image was cut into"
        )
    grid = patches.reshape(batch, rows, columns, channels, patch_height, patch_width)
    ordered = grid.permute(0, 3, 1, 4, 2, 5)  # channel, row in the image, column in the image
    return ordered.reshape(batch, channels, rows * patch_height, columns * patch_width)
