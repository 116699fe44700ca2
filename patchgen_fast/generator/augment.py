"""Small changes of the training images, so that a small set is not learned by heart."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("none", "flip", "affine")
UNCHANGED = 0.2  # this share of the images stays as it is


def augment(images: Tensor, kind: str, chance: Tensor) -> Tensor:
    """Images `[B, C, H, W]` changed at random; floats from 0 to 1, or uint8 where only flipped.

    "flip" mirrors every second image; "affine" turns (7 degrees), stretches (8 %), slants (7
    degrees) and shifts (6 %) by at most that much, with black beyond the border. `chance` `[7, B]`,
    uniform from 0 to 1, decides.
    """
    if kind == "none":
        return images
    if kind == "flip":
        mirrored = (chance[0] < 0.5).to(images.device)[:, None, None, None]
        return torch.where(mirrored, images.flip(-1), images)
    if kind != "affine":
        raise ValueError(f"expected augmentation out of {', '.join(KINDS)}, got {kind!r}")
    images = images / 255 if images.dtype == torch.uint8 else images
    kept = (chance[0] < UNCHANGED).to(images.device)[:, None, None, None]
    return torch.where(kept, images, _warped(images, 2 * chance[1:] - 1))


def _warped(images: Tensor, amount: Tensor) -> Tensor:
    """Affine maps by `amount` `[6, B]` from -1 to 1: turn, stretch twice, slant, shift twice."""
    turn, slant = 0.12 * amount[0], 0.12 * amount[3]
    stretch_x, stretch_y = 1 + 0.08 * amount[1], 1 + 0.08 * amount[2]
    first = torch.stack((turn.cos() * stretch_x, slant - turn.sin(), 0.12 * amount[4]), dim=-1)
    second = torch.stack((turn.sin(), turn.cos() * stretch_y, 0.12 * amount[5]), dim=-1)
    maps = torch.stack((first, second), dim=1).to(images.device)
    grid = torch.nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)
