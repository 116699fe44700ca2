"""The three products of patches and token rows as kernels; patches.py launches them.

Pixels are gathered straight from the image through its strides, made float32, normalised, and
rounded to the weight's dtype on the way. Bytes moved: image, weight and tokens once each. Sums are
float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import wide

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
def _normalised(
    pixels, channel, there, mean, std, BYTES: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """float32 pixels on the 0 to 1 scale, normalised by channel.

    In IEEE float32 by division: the rounding of a reciprocal is the same for every pixel of a
    channel, and adds up over a sum of pixels.
    """
    x = pixels.to(tl.float32)
    if BYTES:
        if PRECISION == "ieee":
            x = tl.div_rn(x, tl.full(x.shape, 255.0, tl.float32))
        else:
            x = x * 0.00392156862745098
    if mean is not None:
        x = x - tl.load(mean + channel, mask=there, other=0.0)[None, :]
    if std is not None:
        divisor = tl.load(std + channel, mask=there, other=1.0)
        if PRECISION == "ieee":
            x = tl.div_rn(x, tl.broadcast_to(divisor[None, :], x.shape))
        else:
            x = x * (1.0 / divisor)[None, :]
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
            x = _normalised(pixels, channel, there, mean, std, BYTES, PRECISION).to(w.dtype)
            total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
        token = m % tokens
        inside = (m < patches)[:, None] & real[None, :]
        if bias is not None:
            # A row for each patch, out of cache: a single one would be loaded 2 bytes a thread.
            every = bias + features[None, :] + (token * 0)[:, None]
            total += tl.load(every, mask=inside, other=0.0).to(tl.float32)
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
        x = _normalised(pixels, channel, there, mean, std, BYTES, PRECISION)
        # What a missing patch gives is 0 whatever its pixels become: its row of g is 0.
        total = tl.dot(tl.trans(g), x.to(g.dtype), total, input_precision=PRECISION)
    result += wide(share) * EMBED * K
    tl.store(
        result + features[:, None] * K + k[None, :],
        total.to(result.dtype.element_ty),
        mask=real[:, None] & there[None, :],
    )
