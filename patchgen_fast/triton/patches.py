"""Patches and token rows: the three products that patch_embed and patch_unembed are made of.

With `pixels` the patches of an image as a matrix [M, K] (M = B * N patches, K = C * Pt * Ph * Pw)
that is never written down, `tokens` [M, E] and `weight` [E, K]:

* `_pixels_to_rows_kernel`: tokens = pixels weight^T (+ bias, position, prefix tokens before). One
  program owns BLOCK_M patches and BLOCK_E features; neighbours share the patches, which come from
  memory once.
* `_rows_to_pixels_kernel`: pixels = tokens weight (+ bias), stored where they belong in the image.
* `_weight_grad_kernel`: tokens^T pixels. One program owns a tile of the weight and a share of the
  patches; the shares are added in order by `sum_shares`.

Pixels are gathered straight from the image through its strides, made float32, normalised, and
rounded to the weight's dtype on the way. Bytes moved: image, weight and tokens once each. Sums are
float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .configs import HALF, IEEE, Row, Table, kind_of
from .launch import capability, dot_precision, empty, launch, multiprocessors, vector
from .tiles import wide


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
        chips=(80, 90, 100, 103),
    ),
    Row(PatchConfig(64, 128, 32, 4, 3), "safe everywhere: 36 KiB of shared memory in TF32"),
)

_GEOMETRY = [
    "stride_b",
    "stride_c",
    "stride_t",
    "stride_h",
    "stride_w",
    "grid_t",
    "grid_h",
    "grid_w",
    "patches",
]


@triton.jit
def _patch_base(
    m, stride_b, stride_t, stride_h, stride_w, grid_t, grid_h, grid_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Where patch m (of all of the batch) begins in the images, in 64 bits."""
    x = m % grid_w
    m = m // grid_w
    y = m % grid_h
    m = m // grid_h
    t = m % grid_t
    batch = m // grid_t
    across = x * PW
    if not UNIT:
        across = across * stride_w
    return wide(batch) * stride_b + wide(t * PT) * stride_t + wide(y * PH) * stride_h + across


@triton.jit
def _pixel_offset(
    k, stride_c, stride_t, stride_h, stride_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Where column k of a patch lies, counted from the patch's begin; and its channel."""
    across = k % PW
    line = k // PW
    down = line % PH
    frame = line // PH
    channel = frame // PT
    if not UNIT:
        across = across * stride_w
    offset = channel * stride_c + (frame % PT) * stride_t + down * stride_h + across
    return offset, channel


@triton.jit
def _normalised(pixels, channel, there, mean, std, BYTES: tl.constexpr):
    """float32 pixels on the 0 to 1 scale, normalised by channel."""
    x = pixels.to(tl.float32)
    if BYTES:
        x = x * 0.00392156862745098
    if mean is not None:
        x = x - tl.load(mean + channel, mask=there, other=0.0)[None, :]
    if std is not None:
        x = x * (1.0 / tl.load(std + channel, mask=there, other=1.0))[None, :]
    return x


@triton.jit(do_not_specialize=[*_GEOMETRY, "tokens", "prefix_tokens", "tiles_e", "tiles"])
def _pixels_to_rows_kernel(
    images, weight, bias, pos_embed, prefix, mean, std, out,
    stride_b, stride_c, stride_t, stride_h, stride_w, grid_t, grid_h, grid_w, patches,
    tokens, prefix_tokens, tiles_e, tiles,
    EMBED: tl.constexpr, K: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    VEC: tl.constexpr, UNIT: tl.constexpr, BYTES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    stride_b = wide(stride_b) * VEC
    stride_c *= VEC
    stride_t *= VEC
    stride_h *= VEC
    features = tl.program_id(0) % tiles_e * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(0) // tiles_e
    real = features < EMBED
    if tile < tiles:
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        base = images + _patch_base(
            m, stride_b, stride_t, stride_h, stride_w, grid_t, grid_h, grid_w, PT, PH, PW, UNIT
        )
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in tl.range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            offset, channel = _pixel_offset(
                k, stride_c, stride_t, stride_h, stride_w, PT, PH, PW, UNIT
            )
            there = k < K
            if K % BLOCK_K == 0:
                pixels = tl.load(
                    base[:, None] + offset[None, :], mask=(m < patches)[:, None], other=0
                )
                w = tl.load(
                    weight + features[:, None] * K + k[None, :], mask=real[:, None], other=0.0
                )
            else:
                pixels = tl.load(
                    base[:, None] + offset[None, :],
                    mask=(m < patches)[:, None] & there[None, :],
                    other=0,
                )
                w = tl.load(
                    weight + features[:, None] * K + k[None, :],
                    mask=real[:, None] & there[None, :],
                    other=0.0,
                )
            x = _normalised(pixels, channel, there, mean, std, BYTES).to(w.dtype)
            total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
        token = m % tokens
        inside = (m < patches)[:, None] & real[None, :]
        if bias is not None:
            total += tl.load(bias + features, mask=real, other=0.0).to(tl.float32)[None, :]
        if pos_embed is not None:
            position = token[:, None] * EMBED + features[None, :]
            total += tl.load(pos_embed + position, mask=inside, other=0.0).to(tl.float32)
        row = wide(m // tokens) * (tokens + prefix_tokens) + prefix_tokens + token
        tl.store(
            out + row[:, None] * EMBED + features[None, :],
            total.to(out.dtype.element_ty),
            mask=inside,
        )
    if prefix is not None:  # noqa: SIM102 (a constexpr decides, then a number)
        if tile >= tiles:
            # Programs past the patches copy the prefix tokens, BLOCK_M rows of the batch each.
            m = (tile - tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
            token = m % prefix_tokens
            batch = wide(m // prefix_tokens)
            inside = (batch < patches // tokens)[:, None] & real[None, :]
            row = batch * (tokens + prefix_tokens) + token
            copied = tl.load(prefix + token[:, None] * EMBED + features[None, :], mask=inside)
            tl.store(out + row[:, None] * EMBED + features[None, :], copied, mask=inside)


@triton.jit(do_not_specialize=[*_GEOMETRY, "tokens", "stride_rb", "stride_rn", "tiles_k"])
def _rows_to_pixels_kernel(
    rows, weight, bias, std, images,
    stride_b, stride_c, stride_t, stride_h, stride_w, grid_t, grid_h, grid_w, patches,
    tokens, stride_rb, stride_rn, tiles_k,
    EMBED: tl.constexpr, K: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    VEC: tl.constexpr, UNIT: tl.constexpr, ROW_VEC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    stride_b = wide(stride_b) * VEC
    stride_c *= VEC
    stride_t *= VEC
    stride_h *= VEC
    k = tl.program_id(0) % tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    there = k < K
    row = (wide(m // tokens) * stride_rb + wide(m % tokens) * stride_rn) * ROW_VEC
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, EMBED, BLOCK_K):
        feature = first + tl.arange(0, BLOCK_K)
        real = feature < EMBED
        if EMBED % BLOCK_K == 0:
            x = tl.load(
                rows + row[:, None] + feature[None, :], mask=(m < patches)[:, None], other=0.0
            )
            w = tl.load(weight + feature[:, None] * K + k[None, :], mask=there[None, :], other=0.0)
        else:
            x = tl.load(
                rows + row[:, None] + feature[None, :],
                mask=(m < patches)[:, None] & real[None, :],
                other=0.0,
            )
            w = tl.load(
                weight + feature[:, None] * K + k[None, :],
                mask=real[:, None] & there[None, :],
                other=0.0,
            )
        total = tl.dot(x, w, total, input_precision=PRECISION)
    base = images + _patch_base(
        m, stride_b, stride_t, stride_h, stride_w, grid_t, grid_h, grid_w, PT, PH, PW, UNIT
    )
    offset, channel = _pixel_offset(k, stride_c, stride_t, stride_h, stride_w, PT, PH, PW, UNIT)
    if bias is not None:
        total += tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)[None, :]
    if std is not None:
        total = total * (1.0 / tl.load(std + channel, mask=there, other=1.0))[None, :]
    tl.store(
        base[:, None] + offset[None, :],
        total.to(images.dtype.element_ty),
        mask=(m < patches)[:, None] & there[None, :],
    )


@triton.jit(
    do_not_specialize=[
        *_GEOMETRY,
        "tokens",
        "stride_rb",
        "stride_rn",
        "tiles_e",
        "tiles_k",
        "shares",
    ]
)
def _weight_grad_kernel(
    rows, images, mean, std, result,
    stride_b, stride_c, stride_t, stride_h, stride_w, grid_t, grid_h, grid_w, patches,
    tokens, stride_rb, stride_rn, tiles_e, tiles_k, shares,
    EMBED: tl.constexpr, K: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    VEC: tl.constexpr, UNIT: tl.constexpr, ROW_VEC: tl.constexpr, BYTES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Result [shares, E, K] from BLOCK_K patches at a time: they are what is contracted."""
    stride_b = wide(stride_b) * VEC
    stride_c *= VEC
    stride_t *= VEC
    stride_h *= VEC
    owner = tl.program_id(0)
    k = owner % tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    owner = owner // tiles_k
    features = owner % tiles_e * BLOCK_M + tl.arange(0, BLOCK_M)
    share = owner // tiles_e
    there = k < K
    real = features < EMBED
    offset, channel = _pixel_offset(k, stride_c, stride_t, stride_h, stride_w, PT, PH, PW, UNIT)
    blocks = (patches + BLOCK_K - 1) // BLOCK_K
    begin = (wide(blocks) * share // shares).to(tl.int32) * BLOCK_K
    end = (wide(blocks) * (share + 1) // shares).to(tl.int32) * BLOCK_K
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(begin, end, BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)
        inside = m < patches
        row = (wide(m // tokens) * stride_rb + wide(m % tokens) * stride_rn) * ROW_VEC
        g = tl.load(
            rows + row[:, None] + features[None, :], mask=inside[:, None] & real[None, :], other=0.0
        )
        base = images + _patch_base(
            m, stride_b, stride_t, stride_h, stride_w, grid_t, grid_h, grid_w, PT, PH, PW, UNIT
        )
        pixels = tl.load(
            base[:, None] + offset[None, :], mask=inside[:, None] & there[None, :], other=0
        )
        x = _normalised(pixels, channel, there, mean, std, BYTES)
        # What a missing patch gives is 0 whatever its pixels become: its row of g is 0.
        total = tl.dot(tl.trans(g), x.to(g.dtype), total, input_precision=PRECISION)
    result += wide(share) * EMBED * K
    tl.store(
        result + features[:, None] * K + k[None, :],
        total.to(result.dtype.element_ty),
        mask=real[:, None] & there[None, :],
    )


@triton.jit(do_not_specialize=["count", "shares"])
def _sum_shares_kernel(partial, result, count, shares, BLOCK: tl.constexpr):
    """Result [count] = the sum of partial [shares, count], first share first."""
    index = wide(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for share in range(shares):
        part = tl.load(partial + wide(share) * count + index, mask=index < count, other=0.0)
        total += part.to(tl.float32)
    tl.store(result + index, total.to(result.dtype.element_ty), mask=index < count)


def sum_shares(partial: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Adds partial [shares, *result.shape] in order into `result`, rounding once."""
    count = result.numel()
    launch(
        _sum_shares_kernel,
        (triton.cdiv(count, 1024),),
        (partial, result, count, partial.shape[0]),
        BLOCK=1024,
        num_warps=4,
    )
    return result


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
