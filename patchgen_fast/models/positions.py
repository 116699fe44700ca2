"""Positions: what tells a token where its patch lies in the image.

A table `[N, E]` that is added to the embedded patches. Three kinds:

- "learned": starts as small noise and is trained (Dosovitskiy et al., 2020, arXiv:2010.11929);
- "sinusoidal": sines and cosines of the patch's number in the sequence
  (Vaswani et al., 2017, arXiv:1706.03762);
- "sincos_2d": half of the features tell the row, half the column
  (He et al., 2021, arXiv:2111.06377).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

PositionKind = Literal["learned", "sinusoidal", "sincos_2d"]
KINDS: tuple[PositionKind, ...] = ("learned", "sinusoidal", "sincos_2d")


def _angles(positions: Tensor, count: int) -> Tensor:
    """`position / 10000 ** (i / count)` for i below count, in float64: [len(positions), count]."""
    frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    return positions.to(torch.float64)[:, None] * frequencies


def sinusoidal(num_positions: int, dim: int) -> Tensor:
    """Table `[num_positions, dim]`, float32: sine at even features, cosine at odd ones.

    Raises ValueError unless `dim` is even.
    """
    if dim % 2:
        raise ValueError(f"expected an even dim for sinusoidal positions, got {dim}")
    angles = _angles(torch.arange(num_positions), dim // 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()


def sincos_2d(grid_size: tuple[int, int], dim: int) -> Tensor:
    """Table `[rows * columns, dim]`, float32: the first half tells the row, the second the column.

    Each half holds its sines, then its cosines. Raises ValueError unless `dim` is a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"expected a dim that is a multiple of 4 for sincos_2d, got {dim}")
    rows, columns = grid_size
    row_angles = _angles(torch.arange(rows), dim // 4).repeat_interleave(columns, dim=0)
    column_angles = _angles(torch.arange(columns), dim // 4).repeat(rows, 1)
    halves = (row_angles.sin(), row_angles.cos(), column_angles.sin(), column_angles.cos())
    return torch.cat(halves, dim=1).float()


def position_table(kind: PositionKind, grid_size: tuple[int, int], dim: int) -> nn.Parameter:
    """The table `[1, N, dim]` of one kind as a parameter; only "learned" asks for gradients."""
    rows, columns = grid_size
    if kind == "learned":
        table = nn.init.trunc_normal_(torch.empty(rows * columns, dim), std=0.02)
    elif kind == "sinusoidal":
        table = sinusoidal(rows * columns, dim)
    elif kind == "sincos_2d":
        table = sincos_2d(grid_size, dim)
    else:
        raise ValueError(f"expected a kind of positions out of {KINDS}, got {kind!r}")
    return nn.Parameter(table[None].to(torch.get_default_dtype()), requires_grad=kind == "learned")
