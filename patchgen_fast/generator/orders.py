"""In which order the patches of an image are drawn.

- "raster": row by row, so that the upper part of an image can be completed;
- "spiral": from the middle outwards, where the subject of most pictures is;
- "random": another permutation for every image (Pang et al., 2024, RandAR; Li et al., 2024, MAR),
  so that any part of an image can be completed.

An order is int64, `[N]` or one row an image `[B, N]`: the number of the patch drawn first, second
and so on. The decoder is told the place of the patch to be drawn; where the order is random, it is
also told from which place the patch before came.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

OrderKind = Literal["raster", "spiral", "random"]
KINDS: tuple[OrderKind, ...] = ("raster", "spiral", "random")


def spiral(grid_size: tuple[int, int]) -> Tensor:
    """The places `[N]` of a grid from the middle outwards.

    The reverse of walking around the border, right, down, left, up, and then around what is left.

        >>> spiral((3, 3)).tolist()
        [4, 3, 6, 7, 8, 5, 2, 1, 0]
    """
    rows, columns = grid_size
    grid = torch.arange(rows * columns).reshape(rows, columns)
    walked = []
    while grid.numel():
        walked.append(grid[0])
        grid = grid[1:].T.flip(0)  # what is left, turned so that the next side is on top
    return torch.cat(walked).flip(0)


def drawing_order(
    kind: OrderKind,
    grid_size: tuple[int, int],
    *,
    batch: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The order of a kind for a grid of patches: `[N]`, or `[batch, N]` where it is random."""
    places = grid_size[0] * grid_size[1]
    if kind == "raster":
        return torch.arange(places)
    if kind == "spiral":
        return spiral(grid_size)
    if kind == "random":
        return torch.rand(batch, places, generator=generator).argsort(dim=1)
    raise ValueError(f"expected an order out of {', '.join(KINDS)}, got {kind!r}")


def given_first(order: Tensor, given: Tensor) -> Tensor:
    """An order with the places `given` `[n]` moved to its front, the others behind as they were."""
    known = torch.isin(order, given)
    return order.gather(-1, (~known).to(torch.int8).argsort(dim=-1, stable=True))
