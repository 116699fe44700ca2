"""What the attention kernels share: where a head begins, what a row sees, softmax in base two.

Scores are kept in the unit that costs least. In 16 bits and without an additive mask they stay the
bare products, and `unit` is scale * log2(e), folded into the one FMA before exp2. With an additive
mask, and in float32, they are "natural": scale * product + mask, and `unit` is log2(e), applied
after the row's maximum or log-sum-exp has been subtracted. A mask of finfo.min times log2(e) would
be -inf and empty a row that only -inf may empty; and in float32 a product with log2(e) before the
subtraction is one rounding more than eager's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import dot_precision, vector
from .tiles import (
    LN2,
    LOG2E,
    MASK_BOOL,
    MASK_NONE,
    add_dot,
    chunks,
    scale_tile,
    wide,
)

MASK_STRIDES = ["stride_mb", "stride_mh", "stride_mq", "stride_mk"]
SIZES = ["heads", "group", "nq", "nk"]


class Spec(NamedTuple):
    """What an attention kernel is compiled for, apart from its blocks: one constexpr, SPEC.

    `chunks` are those of D. Strides of query, key, value, out and their gradients come divided by
    `vec`, a mask's by `mask_vec`. `mask_rows`: the mask differs from row to row; `mask_unit`: its
    neighbouring keys are neighbours in memory. `may_be_empty`: a row can be left without a key.
    `natural`: scores as above; `precise`: IEEE float32; `corrected`: the backward takes out what
    rounding the log-sum-exp to float32 lost.
    """

    d: int
    chunks: tuple[tuple[int, int], ...]
    vec: int
    mask_kind: int
    mask_rows: bool
    mask_unit: bool
    mask_vec: int
    causal: bool
    may_be_empty: bool
    natural: bool
    precise: bool
    corrected: bool
    precision: str


@triton.jit
def head_offset(batch, head, stride_batch, stride_head, VEC: tl.constexpr):
    """Elements from the start of a tensor to (batch, head); strides come divided by VEC."""
    return (wide(batch) * stride_batch + wide(head) * stride_head) * VEC


@triton.jit
def score_unit(scale, SPEC: tl.constexpr):
    """What a score is multiplied by to become an exponent of two."""
    if SPEC.natural:
        return tl.full([], LOG2E, tl.float32)
    else:
        return scale * LOG2E


@triton.jit
def visible_keys(batch, nk, KV_LENGTHS):
    """Keys of this batch entry, clamped to what is there."""
    if KV_LENGTHS is None:
        return nk
    else:
        return tl.minimum(tl.maximum(tl.load(KV_LENGTHS + batch), 0), nk)


@triton.jit
def causal_offset(batch, QUERY_OFFSET):
    """How far right of its own index a query may look."""
    if QUERY_OFFSET is None:
        return 0
    else:
        # Clamped so that adding a row index cannot wrap round.
        return tl.minimum(tl.maximum(tl.load(QUERY_OFFSET + batch), -(1 << 29)), 1 << 29)


@triton.jit
def mask_scores(
    scores, mask, stride_row, stride_key, first_row, first_key, row, key, nq, keys_end, offset,
    scale, SPEC: tl.constexpr,
    CHECK_KEYS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Applies mask, key bound and causality to a block of scores whose corner is at
    (first_row, first_key).

    `row` and `key` are the block's own indices, [R, 1] and [1, K], or [1, R] and [K, 1] for scores
    that lie transposed. `mask` points at the head's first entry. With mask_rows False the mask is
    the same for all rows and one vector is loaded.
    """
    if SPEC.natural:
        scores *= scale
    if SPEC.mask_kind != MASK_NONE:
        stride_row *= SPEC.mask_vec
        if SPEC.mask_unit:
            corner = mask + (wide(first_row) * stride_row + first_key)
            offsets = key
        else:
            corner = mask + (wide(first_row) * stride_row + wide(first_key) * stride_key)
            offsets = key * stride_key
        # A bound on every key keeps the load from being wide: only where keys can be missing.
        inside = (first_key + key < keys_end) if CHECK_KEYS else (key >= 0)
        if SPEC.mask_rows:
            offsets = offsets + row * stride_row
            inside = inside & (first_row + row < nq)
        if SPEC.mask_kind == MASK_BOOL:
            allowed = tl.load(corner + offsets, mask=inside, other=0) != 0
            scores = tl.where(allowed, scores, float("-inf"))
        else:
            bias = tl.load(corner + offsets, mask=inside, other=0.0).to(tl.float32)
            scores += bias
    if CHECK_KEYS:
        scores = tl.where(first_key + key < keys_end, scores, float("-inf"))
    if CAUSAL:
        scores = tl.where(first_key + key <= first_row + row + offset, scores, float("-inf"))
    return scores


@triton.jit
def finite_maximum(maximum, MAY_BE_EMPTY: tl.constexpr):
    """The row maximum, or 0 for a row that sees nothing, so that -inf minus it stays -inf."""
    if MAY_BE_EMPTY:
        return tl.where(maximum == float("-inf"), 0.0, maximum)
    else:
        return maximum


@triton.jit
def exponential(x, SPEC: tl.constexpr):
    """exp(x) of x at most 0 or little above, by exp2.

    In IEEE float32 the rounding of x * log2(e) would be as large as |x| units in the last place:
    whole powers of two are taken out first, with ln 2 in two parts (Cody and Waite 1980).
    """
    if SPEC.precise:
        x = tl.maximum(x, -200.0)
        whole = tl.floor(x * LOG2E + 0.5)
        rest = (x - whole * 0.693359375) - whole * -2.12194440e-4
        return tl.exp2(whole) * tl.exp2(rest * LOG2E)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def rescaling(fall, unit, SPEC: tl.constexpr):
    """exp of a maximum's fall, which is in the scores' unit."""
    if SPEC.precise:
        return exponential(fall, SPEC)
    else:
        return tl.exp2(fall * unit)


@triton.jit
def exponentials(scores, maximum, unit, SPEC: tl.constexpr):
    """exp(score - maximum of its row)."""
    if SPEC.natural:
        return exponential(scores - maximum[:, None], SPEC)
    else:
        return tl.exp2(scores * unit - (maximum * unit)[:, None])


@triton.jit
def inverse_and_lse(maximum, total, unit, SPEC: tl.constexpr):
    """1 / sum and the natural log-sum-exp; 0 and -inf for a row that sees nothing."""
    if SPEC.natural:  # noqa: SIM108 (a constexpr decides)
        lse = maximum + tl.log(total)
    else:
        lse = (maximum * unit + tl.log2(total)) * LN2
    if SPEC.may_be_empty:
        empty = total == 0.0
        inverse = tl.where(empty, 0.0, 1.0 / total)
        lse = tl.where(empty, float("-inf"), lse)
    else:
        inverse = 1.0 / total
    return inverse, lse


@triton.jit
def online_softmax_update(
    scores, values, maximum, total, tile, unit,
    SPEC: tl.constexpr,
):  # fmt: skip
    """Takes one block of keys into the running maximum, sum and output tile of each row."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    shift = finite_maximum(new_maximum, SPEC.may_be_empty)
    rescale = rescaling(maximum - shift, unit, SPEC)
    weights = exponentials(scores, shift, unit, SPEC)
    total = total * rescale + tl.sum(weights, 1)
    tile = add_dot(scale_tile(tile, rescale), weights.to(values[0].dtype), values, SPEC.precision)
    return new_maximum, total, tile


@triton.jit
def sequence(offsets, index, longest):
    """Start (64 bits) and length of a packed sequence; the length is clamped to 0 .. `longest`.

    The offsets are the caller's word on a GPU, where nothing reads them back: an offset that runs
    backwards gives an empty sequence instead of a negative length.
    """
    start = tl.maximum(tl.load(offsets + index), 0)
    length = tl.load(offsets + index + 1) - start
    return start.to(tl.int64), tl.minimum(tl.maximum(length, 0), longest)


@triton.jit
def probabilities(scores, lse, correction, unit, SPEC: tl.constexpr):
    """exp(score - lse); `lse` and `correction` are broadcast over the block's rows."""
    if SPEC.natural:
        p = exponential(scores - lse, SPEC)
        if SPEC.corrected:
            p *= correction
        return p
    else:
        return tl.exp2(scores * unit - lse * LOG2E)


@triton.jit
def load_lse(lse, row, keep):
    """The log-sum-exp, or +inf for rows that saw nothing or are not there: their P is 0."""
    value = tl.load(lse + row, mask=keep, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value)


def make_spec(
    tensors: tuple[torch.Tensor, ...],
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    may_be_empty: bool,
) -> tuple[Spec, tuple[int, ...], tuple[int, ...]]:
    """The Spec of a call and the strides that go with it.

    `tensors` are [.., heads, tokens, D]: their strides but the last come back one after the other,
    three a tensor (the batch's is 0 for packed sequences, whose offsets say where they start), then
    those of the mask, 0 where it is broadcast.
    """
    first = tensors[0]
    dtype = first.dtype
    mask = None
    if attn_mask is not None:
        mask = attn_mask.dtype, attn_mask.shape, attn_mask.stride()
    strides = tuple([tensor.stride() for tensor in tensors])
    return _spec(
        first.shape[-1], dtype, dot_precision(dtype), strides, mask, is_causal, may_be_empty
    )


@lru_cache(maxsize=4096)
def _spec(
    d: int,
    dtype: torch.dtype,
    precision: str,
    all_strides: tuple[tuple[int, ...], ...],
    mask: tuple[torch.dtype, torch.Size, tuple[int, ...]] | None,
    is_causal: bool,
    may_be_empty: bool,
) -> tuple[Spec, tuple[int, ...], tuple[int, ...]]:
    strides: tuple[int, ...] = ()
    for each in all_strides:
        strides += each[:3] if len(each) == 4 else (0, *each[:2])
    vec = vector(dtype.itemsize, *strides)
    batch = head = row = key = 0
    kind, unit, mask_vec = 0, True, 1
    if mask is not None:
        mask_dtype, mask_shape, mask_strides = mask
        batch, head, row, key = (
            0 if size == 1 else stride
            for size, stride in zip(mask_shape, mask_strides, strict=True)
        )
        kind, unit = (1 if mask_dtype is torch.bool else 2), key == 1
        if unit:
            mask_vec = vector(max(2, mask_dtype.itemsize), batch, head, row)
    # Float32 operands of 64 columns at a time: half the registers, and sums in shorter pieces.
    widest = 64 if dtype is torch.float32 else 256
    spec = Spec(
        d=d,
        chunks=chunks(d, widest),
        vec=vec,
        mask_kind=kind,
        mask_rows=row != 0,
        mask_unit=unit,
        mask_vec=mask_vec,
        causal=is_causal,
        may_be_empty=may_be_empty or kind != 0,
        natural=kind == 2 or dtype is torch.float32,
        precise=precision == "ieee",
        corrected=kind == 2 or precision == "ieee",
        precision=precision,
    )
    scaled = tuple(stride // vec for stride in strides)
    return spec, scaled, (batch // mask_vec, head // mask_vec, row // mask_vec, key)


def positive_scale(query: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The row maximum is taken before scaling, which wants a positive scale: signs go to the query.

    A scale of 0 becomes one so small that every exponential is exactly 1.
    """
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale < 0 else (query, 2.0**-100)


def covered(size: int, widest: int = 256) -> int:
    """How much of `size` its chunks cover, padding included."""
    return sum(width for _, width in chunks(size, widest))
