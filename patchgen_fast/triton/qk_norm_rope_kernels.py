"""The kernels of qk_norm_rope.py, which says what they compute and what a program owns.

A row of D is held as its two members of every pair, [tokens, D / 2] each, so that the turn needs no
exchange. Arithmetic in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import wide


class RopeSpec(NamedTuple):
    """What a kernel is compiled for. `half` is D / 2 rounded up, `width` the power of two above.

    Strides of query, key and gradients come divided by `vec`.
    """

    d: int
    vec: int
    half: int
    width: int
    norm: str
    interleaved: bool
    rotate: bool


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([ROWS, WIDTH], dtype=tl.float32)


@triton.jit
def _columns(SPEC: tl.constexpr):
    """Where the two members of each pair lie in a row of D, and whether they are there."""
    lane = tl.arange(0, SPEC.width)
    if SPEC.interleaved:
        first = 2 * lane
        second = first + 1
    else:
        first = lane
        second = lane + SPEC.half
    return first, second, lane < SPEC.half, (lane < SPEC.half) & (second < SPEC.d)


@triton.jit
def _pair(base, rows, keep, default, SPEC: tl.constexpr):
    """Both members of the pairs of rows at `base + rows`, float32; `default` where nothing is."""
    first, second, has_first, has_second = _columns(SPEC)
    x1 = tl.load(
        base + rows[:, None] + first[None, :],
        mask=keep[:, None] & has_first[None, :],
        other=default,
    )
    x2 = tl.load(
        base + rows[:, None] + second[None, :],
        mask=keep[:, None] & has_second[None, :],
        other=default,
    )
    return x1.to(tl.float32), x2.to(tl.float32)


@triton.jit
def _store_pair(base, rows, keep, x1, x2, SPEC: tl.constexpr):
    first, second, has_first, has_second = _columns(SPEC)
    kind = base.dtype.element_ty
    tl.store(
        base + rows[:, None] + first[None, :], x1.to(kind), mask=keep[:, None] & has_first[None, :]
    )
    tl.store(
        base + rows[:, None] + second[None, :],
        x2.to(kind),
        mask=keep[:, None] & has_second[None, :],
    )


@triton.jit
def _row_mean(x1, x2, SPEC: tl.constexpr):
    return ((tl.sum(x1, 1) + tl.sum(x2, 1)) / SPEC.d)[:, None]


@triton.jit
def _normalise(x1, x2, eps, SPEC: tl.constexpr):
    """Normalised rows and rstd [rows, 1]."""
    rstd = tl.full([x1.shape[0], 1], 1.0, tl.float32)
    if SPEC.norm == "layer":
        _, _, has_first, has_second = _columns(SPEC)
        mean = _row_mean(x1, x2, SPEC)
        x1 = tl.where(has_first[None, :], x1 - mean, 0.0)
        x2 = tl.where(has_second[None, :], x2 - mean, 0.0)
    if SPEC.norm != "none":
        rstd = 1.0 / tl.sqrt(_row_mean(x1 * x1, x2 * x2, SPEC) + eps)
        x1 *= rstd
        x2 *= rstd
    return x1, x2, rstd


@triton.jit
def _vector(weight, default, SPEC: tl.constexpr):
    """Both members of a weight [D], [1, width] each."""
    first, second, has_first, has_second = _columns(SPEC)
    w1 = tl.load(weight + first, mask=has_first, other=default).to(tl.float32)
    w2 = tl.load(weight + second, mask=has_second, other=default).to(tl.float32)
    return w1[None, :], w2[None, :]


@triton.jit
def _affine(x1, x2, weight, bias, SPEC: tl.constexpr):
    if weight is not None:
        w1, w2 = _vector(weight, 0.0, SPEC)
        x1 *= w1
        x2 *= w2
    if bias is not None:
        b1, b2 = _vector(bias, 0.0, SPEC)
        x1 += b1
        x2 += b2
    return x1, x2


@triton.jit
def _angles(cos, sin, position, stride_n, there, SPEC: tl.constexpr):
    """cos and sin of both members; 1 and 0 for prefix tokens (`there` False)."""
    rows = position * stride_n
    c1, c2 = _pair(cos, rows, there, 1.0, SPEC)
    s1, s2 = _pair(sin, rows, there, 0.0, SPEC)
    return c1, c2, s1, s2


@triton.jit
def _forward_rows(
    x, weight, bias, cos, sin, out, stride_b, stride_h, stride_n, stride_cb, stride_ch, stride_cn,
    batch, head, heads, token, tokens, prefix, eps, SPEC: tl.constexpr,
):  # fmt: skip
    keep = token < tokens
    x += (wide(batch) * stride_b + wide(head) * stride_h) * SPEC.vec
    x1, x2 = _pair(x, wide(token) * stride_n * SPEC.vec, keep, 0.0, SPEC)
    x1, x2, _ = _normalise(x1, x2, eps, SPEC)
    a1, a2 = _affine(x1, x2, weight, bias, SPEC)
    if SPEC.rotate:
        start = wide(batch) * stride_cb + wide(head) * stride_ch
        c1, c2, s1, s2 = _angles(
            cos + start, sin + start, wide(token) - prefix, stride_cn,
            keep & (token >= prefix), SPEC,
        )  # fmt: skip
        y1 = a1 * c1 - a2 * s1
        y2 = a2 * c2 + a1 * s2
    else:
        y1, y2 = a1, a2
    rows = ((wide(batch) * tokens + token) * heads + head) * SPEC.d
    _store_pair(out, rows, keep, y1, y2, SPEC)


_STRIDES = [f"stride_{t}{d}" for t in "qk" for d in "bhn"]
_ANGLES = ["stride_cb", "stride_ch", "stride_cn"]


@triton.jit(
    do_not_specialize=[
        *_STRIDES,
        *_ANGLES,
        "heads",
        "kv_heads",
        "tokens",
        "prefix",
        "blocks",
        "eps",
    ]
)
def _qk_norm_rope_fwd_kernel(
    query, key, q_weight, k_weight, q_bias, k_bias, cos, sin, q_out, k_out,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_cb, stride_ch, stride_cn, heads, kv_heads, tokens, prefix, blocks, eps,
    SPEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    pair = tl.program_id(0) // blocks
    head, batch = pair % (heads + kv_heads), pair // (heads + kv_heads)
    if head < heads:
        _forward_rows(
            query, q_weight, q_bias, cos, sin, q_out, stride_qb, stride_qh, stride_qn,
            stride_cb, stride_ch, stride_cn, batch, head, heads, token, tokens, prefix, eps, SPEC,
        )  # fmt: skip
    else:
        _forward_rows(
            key, k_weight, k_bias, cos, sin, k_out, stride_kb, stride_kh, stride_kn,
            stride_cb, stride_ch, stride_cn, batch, head - heads, kv_heads, token, tokens, prefix,
            eps, SPEC,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "stride_gb",
        "stride_gh",
        "stride_gn",
        "stride_xb",
        "stride_xh",
        "stride_xn",
        *_ANGLES,
        "batches",
        "heads",
        "tokens",
        "prefix",
        "blocks",
        "angle_batches",
        "angle_heads",
        "shares",
        "eps",
    ]
)
def _qk_norm_rope_bwd_kernel(
    grad, x, weight, bias, cos, sin, grad_x, partial_weight, partial_bias, partial_cos, partial_sin,
    stride_gb, stride_gh, stride_gn, stride_xb, stride_xh, stride_xn,
    stride_cb, stride_ch, stride_cn, batches, heads, tokens, prefix, blocks,
    angle_batches, angle_heads, shares, eps,
    SPEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums: weight, bias [programs, D]; cos, sin [shares, angle batches, angle heads,
    tokens - prefix, D]. Query and key are a launch each.
    """
    program = tl.program_id(0)
    token = program % blocks * BLOCK + tl.arange(0, BLOCK)
    owner = program // blocks
    share = owner % shares
    angle_head = owner // shares % angle_heads
    angle_batch = owner // shares // angle_heads
    keep = token < tokens
    turned = keep & (token >= prefix)
    pairs = (batches // angle_batches) * (heads // angle_heads)
    zero = _zeros(BLOCK, SPEC.width)
    weight1, weight2, bias1, bias2 = zero, zero, zero, zero
    cos1, cos2, sin1, sin2 = zero, zero, zero, zero
    for pair in range(pairs * share // shares, pairs * (share + 1) // shares):
        batch = angle_batch + pair // (heads // angle_heads)
        head = angle_head + pair % (heads // angle_heads)
        rows = (wide(batch) * stride_gb + wide(head) * stride_gh) * SPEC.vec
        rows = rows + wide(token) * stride_gn * SPEC.vec
        g1, g2 = _pair(grad, rows, keep, 0.0, SPEC)
        rows = (wide(batch) * stride_xb + wide(head) * stride_xh) * SPEC.vec
        rows = rows + wide(token) * stride_xn * SPEC.vec
        x1, x2 = _pair(x, rows, keep, 0.0, SPEC)
        x1, x2, rstd = _normalise(x1, x2, eps, SPEC)
        if SPEC.rotate:
            start = wide(batch) * stride_cb + wide(head) * stride_ch
            c1, c2, s1, s2 = _angles(
                cos + start, sin + start, wide(token) - prefix, stride_cn, turned, SPEC
            )
            if partial_cos is not None:
                a1, a2 = _affine(x1, x2, weight, bias, SPEC)
                cos1 += g1 * a1
                cos2 += g2 * a2
                sin1 -= g1 * a2
                sin2 += g2 * a1
            back1 = g1 * c1 + g2 * s2
            g2 = g2 * c2 - g1 * s1
            g1 = back1
        if partial_bias is not None:
            bias1 += g1
            bias2 += g2
        if weight is not None:
            weight1 += g1 * x1
            weight2 += g2 * x2
            w1, w2 = _vector(weight, 0.0, SPEC)
            g1 *= w1
            g2 *= w2
        if SPEC.norm != "none":
            slope = _row_mean(g1 * x1, g2 * x2, SPEC)
            level = tl.zeros_like(slope)
            if SPEC.norm == "layer":
                level = _row_mean(g1, g2, SPEC)
            g1 = (g1 - slope * x1 - level) * rstd
            g2 = (g2 - slope * x2 - level) * rstd
        rows = ((wide(batch) * tokens + token) * heads + head) * SPEC.d
        _store_pair(grad_x, rows, keep, g1, g2, SPEC)
    one = tl.zeros([1], tl.int64) + wide(program) * SPEC.d
    true = tl.full([1], 1, tl.int1)
    if weight is not None:
        _store_pair(
            partial_weight,
            one,
            true,
            tl.sum(weight1, 0)[None, :],
            tl.sum(weight2, 0)[None, :],
            SPEC,
        )
    if partial_bias is not None:
        _store_pair(
            partial_bias, one, true, tl.sum(bias1, 0)[None, :], tl.sum(bias2, 0)[None, :], SPEC
        )
    if partial_cos is not None:
        group = (wide(share) * angle_batches + angle_batch) * angle_heads + angle_head
        rows = (group * (tokens - prefix) + token - prefix) * SPEC.d
        _store_pair(partial_cos, rows, turned, cos1, cos2, SPEC)
        _store_pair(partial_sin, rows, turned, sin1, sin2, SPEC)
