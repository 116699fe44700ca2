"""Helpers shared by the kernels: tiles cut into column chunks, masks, softmax pieces.

A tile of R rows and D columns is a tuple of chunks, one per (start, width) pair of `chunks(D)`.
Every width is a power of two of at least 16, as `tl.arange` and the matrix instructions want it, so
D = 72 is contracted as 64 + 16 and D = 104 as 64 + 32 + 16 instead of being padded to 128. The key
axis of the short-sequence kernels is cut the same way: 197 keys are 128 + 64 + 16.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASK_NONE = tl.constexpr(0)
MASK_BOOL = tl.constexpr(1)
MASK_ADDITIVE = tl.constexpr(2)


@cache
def chunks(size: int, widest: int = 256) -> tuple[tuple[int, int], ...]:
    """Cuts `size` into at most three (start, width) pairs, widths being falling powers of two.

    The cover is the smallest multiple of 16 that three powers of two of at most `widest` can make
    up, so every chunk but the last lies wholly inside `size`.
    """
    rest = -(-max(size, 1) // 16) * 16
    widths: list[int] = []
    while rest > 0:
        width = min(widest, 1 << (rest.bit_length() - 1))
        if len(widths) == 2 and width < rest:
            width *= 2
        widths.append(width)
        rest -= width
    while len(widths) > 1 and widths[-1] == widths[-2] and widths[-1] * 2 <= widest:
        widths[-2:] = [widths[-1] * 2]
    return tuple((sum(widths[:i]), width) for i, width in enumerate(widths))


@triton.jit
def wide(index):
    """An index in 64 bits, to be multiplied by a stride; takes a loop's own integer too."""
    return index + tl.zeros([], dtype=tl.int64)


@triton.jit
def zeros_tile(ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """A float32 tile of zeros, [ROWS, width] for each chunk."""
    tile = ()
    for i in tl.static_range(len(CHUNKS)):
        tile = tile + (_zeros(ROWS, CHUNKS[i][1]),)  # type: ignore[assignment]
    return tile


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([ROWS, WIDTH], dtype=tl.float32)


@triton.jit
def load_tile(base, offsets, keep, D: tl.constexpr, CHUNKS: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """Loads rows at `base + offsets` ([ROWS], in elements); rows without `keep` and columns past D
    are 0.
    """
    tile = ()
    for i in tl.static_range(len(CHUNKS)):
        columns = CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
        pointers = base + (offsets[:, None] + columns[None, :])
        if CHUNKS[i][0] + CHUNKS[i][1] > D:
            if CHECK_ROWS:
                part = tl.load(pointers, mask=keep[:, None] & (columns[None, :] < D), other=0.0)
            else:
                part = tl.load(pointers, mask=columns[None, :] < D, other=0.0)
        else:
            if CHECK_ROWS:
                part = tl.load(pointers, mask=keep[:, None], other=0.0)
            else:
                part = tl.load(pointers)
        tile = tile + (part,)  # type: ignore[assignment]
    return tile


@triton.jit
def store_tile(base, offsets, keep, tile, D: tl.constexpr, CHUNKS: tl.constexpr):
    """Stores a tile's rows that are in `keep`, columns to D, in the pointer's dtype."""
    for i in tl.static_range(len(CHUNKS)):
        columns = CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
        inside = keep[:, None]
        if CHUNKS[i][0] + CHUNKS[i][1] > D:
            inside = inside & (columns[None, :] < D)
        pointers = base + (offsets[:, None] + columns[None, :])
        tl.store(pointers, tile[i].to(base.dtype.element_ty), mask=inside)


@triton.jit
def scale_tile(tile, factor):
    """Multiplies each row of a tile by `factor` [ROWS]."""
    scaled = ()
    for i in tl.static_range(len(tile)):
        scaled = scaled + (tile[i] * factor[:, None],)  # type: ignore[assignment]
    return scaled


@triton.jit
def dot_rows(a, b, PRECISION: tl.constexpr):
    """a [M, D] times b [N, D] transposed, contracted chunk by chunk: [M, N]."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision=PRECISION)
    return product


@triton.jit
def add_dot(accumulator, weights, b, PRECISION: tl.constexpr):
    """accumulator [M, D] + weights [M, N] times b [N, D]."""
    total = ()
    for i in tl.static_range(len(b)):
        total = total + (tl.dot(weights, b[i], accumulator[i], input_precision=PRECISION),)  # type: ignore[assignment]
    return total
