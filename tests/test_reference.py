"""The reference itself, which all else is measured by: against formulas written another way, in
float64, with their gradients; and its explicit backwards against torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from oracle import rng
from torch import Tensor

from patchgen_fast import reference

F64 = torch.float64


def numbers(*shape: int, seed: object = 0) -> Tensor:
    x = torch.randn(shape, generator=rng(shape, seed), dtype=F64)
    return x.requires_grad_()


def assert_same(
    got: Sequence[Tensor | None], want: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> None:
    """Equal results and, under random cotangents, equal gradients, to float64's rounding."""
    got, want = ([x for x in found if x is not None] for found in (got, want))
    grads = []
    for results in (got, want):
        total = sum(
            (
                x.masked_fill(~x.isfinite(), 0) * torch.randn(x.shape, generator=rng(i), dtype=F64)
            ).sum()
            for i, x in enumerate(results)
        )
        grads.append(torch.autograd.grad(total, inputs, allow_unused=True))
    for a, b in zip([*got, *grads[0]], [*want, *grads[1]], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------- attention


def attention_row_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    may_see: Callable[[int, int, int, int], bool],
    added: Callable[[int, int, int, int], Tensor | float],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention as a loop over rows and the keys that each sees."""
    batch, heads, rows, _ = query.shape
    shared_by = heads // key.shape[1]
    outs, lses = [], []
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                keys = [j for j in range(key.shape[2]) if may_see(b, h, i, j)]
                if not keys:
                    outs.append(query[b, h, i] * 0)
                    lses.append(torch.tensor(-torch.inf, dtype=F64))
                    continue
                scores = torch.stack(
                    [
                        torch.einsum("d,d->", query[b, h, i], key[b, h // shared_by, j]) * scale
                        + added(b, h, i, j)
                        for j in keys
                    ]
                )
                weights = (scores - scores.max().detach()).exp()
                values = torch.stack([value[b, h // shared_by, j] for j in keys])
                outs.append(torch.einsum("j,jd->d", weights / weights.sum(), values))
                lses.append(weights.sum().log() + scores.max().detach())
    shape = (batch, heads, rows)
    return torch.stack(outs).view(*shape, -1), torch.stack(lses).view(shape)


ATTENTION_VARIANTS = [
    "plain", "grouped", "bool", "additive", "additive, -inf", "additive, finfo.min", "lengths",
    "causal", "causal, offset", "joined",
]  # fmt: skip


@pytest.mark.parametrize("variant", ATTENTION_VARIANTS)
def test_attention_is_softmax_row_by_row(variant: str) -> None:
    batch, heads, rows, keys, dim = 2, 4, 5, 6, 3
    query = numbers(batch, heads, rows, dim, seed="q")
    kv_heads = 2 if variant in ("grouped", "joined") else heads
    key, value = (numbers(batch, kv_heads, keys, dim, seed=s) for s in "kv")
    inputs = [query, key, value]
    mask = lengths = offset = None
    if variant == "bool":
        mask = torch.rand(batch, 1, rows, keys, generator=rng(1)) < 0.5
        mask[0, 0, 2] = False
    elif variant.startswith("additive") or variant == "joined":
        values = torch.randn(1, heads, rows, keys, generator=rng(2), dtype=F64)
        if variant == "additive, finfo.min":
            values[:, :, 1] = torch.finfo(torch.float32).min
            values[:, :, 2, 3:] = torch.finfo(torch.float32).min
        elif variant != "additive":
            values[values < -0.5] = -torch.inf
            values[0, :, 3] = -torch.inf
        mask = values.requires_grad_()
        inputs.append(mask)
    if variant in ("lengths", "joined"):
        lengths = torch.tensor([0, 4]) if variant == "lengths" else torch.tensor([5, 4])
    if variant in ("causal, offset", "joined"):
        offset = torch.tensor([-2, 2])
    is_causal = variant.startswith("causal") or variant == "joined"

    def may_see(b: int, h: int, i: int, j: int) -> bool:
        allowed = True
        if mask is not None:
            at = mask.detach().expand(batch, heads, rows, keys)[b, h, i, j]
            allowed = bool(at) if mask.dtype == torch.bool else float(at) != -torch.inf
        if lengths is not None:
            allowed = allowed and j < int(lengths[b])
        if is_causal:
            allowed = allowed and j <= i + (0 if offset is None else int(offset[b]))
        return allowed

    def added(b: int, h: int, i: int, j: int) -> Tensor | float:
        if mask is None or mask.dtype == torch.bool:
            return 0.0
        return mask.expand(batch, heads, rows, keys)[b, h, i, j]

    got = reference.attention(query, key, value, mask, lengths, offset, is_causal, 0.7)
    want = attention_row_by_row(query, key, value, may_see, added, 0.7)
    assert_same(got, want, inputs)
    again = reference.attention(query, key, value, mask, lengths, offset, is_causal, 0.7)
    cotangents = [numbers(*x.shape, seed=i).detach() for i, x in enumerate(again)]
    total = sum(
        (x.masked_fill(x == -torch.inf, 0) * g).sum()
        for x, g in zip(again, cotangents, strict=True)
    )
    grads = torch.autograd.grad(total, inputs)
    mask_grad = len(inputs) == 4
    saved = (x.detach() for x in again)
    explicit = reference.attention_backward(
        *cotangents, query, key, value, *saved, mask, lengths, offset, is_causal, 0.7, mask_grad
    )
    for a, b in zip(explicit if mask_grad else explicit[:3], grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_causal", [False, True])
def test_varlen_attention_is_attention_of_each_sequence(is_causal: bool) -> None:
    lengths_q, lengths_k = [3, 0, 5, 2, 1], [4, 2, 3, 0, 1]
    query = numbers(13, 4, 3, seed="q")  # two rows more than the sequences take
    key, value = (numbers(11, 2, 3, seed=s) for s in "kv")
    offsets = [
        F.pad(torch.tensor(x).cumsum(0), (1, 0)).to(torch.int32) for x in (lengths_q, lengths_k)
    ]
    got, lse = reference.varlen_attention(query, key, value, *offsets, 5, 4, is_causal, 0.6)
    outs, lses = [], []
    for s, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        start_q, start_k = int(offsets[0][s]), int(offsets[1][s])

        def may_see(b: int, h: int, i: int, j: int, n: int = n, m: int = m) -> bool:
            return not is_causal or j <= i + m - n

        if n:
            one = attention_row_by_row(
                query[start_q : start_q + n].transpose(0, 1).unsqueeze(0),
                key[start_k : start_k + m].transpose(0, 1).unsqueeze(0),
                value[start_k : start_k + m].transpose(0, 1).unsqueeze(0),
                may_see,
                lambda b, h, i, j: 0.0,
                0.6,
            )
            outs.append(one[0][0].transpose(0, 1))
            lses.append(one[1][0])
    outs.append(query[11:] * 0)
    lses.append(torch.full((4, 2), -torch.inf, dtype=F64))
    assert_same((got, lse), (torch.cat(outs), torch.cat(lses, dim=1)), [query, key, value])


# ------------------------------------------------------------------------- patches, forth and back


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_patch_embed_is_a_convolution(video: bool, extras: bool) -> None:
    patch = (2, 3, 2) if video else (3, 2)
    images = numbers(2, 3, *((5, 7, 5) if video else (7, 5)))  # margins that fill no patch
    weight, bias = numbers(4, 3, *patch), numbers(4)
    convolve = F.conv3d if video else F.conv2d
    inputs = [images, weight, bias]
    if not extras:
        want = convolve(images, weight, bias, stride=patch).flatten(2).mT
        assert_same([reference.patch_embed(images, weight, bias)], [want], inputs)
        return
    mean, std = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.5, 2.0, 0.7]).double()
    normal = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    tokens = convolve(normal, weight, bias, stride=patch).flatten(2).mT
    pos, prefix = numbers(tokens.shape[1], 4, seed="pos"), numbers(2, 4, seed="prefix")
    want = torch.stack([torch.cat((prefix, one + pos)) for one in tokens])
    got = reference.patch_embed(images, weight, bias, pos, prefix, mean, std)
    assert_same([got], [want], [*inputs, pos, prefix])


def test_patch_embed_of_bytes() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), generator=rng(0), dtype=torch.uint8)
    weight = numbers(5, 3, 2, 2)
    want = F.conv2d(images.double() / 255, weight, stride=2).flatten(2).mT
    got = reference.patch_embed(images, weight, arithmetic=F64)
    assert_same([got], [want], [weight])


def test_patch_embed_looks_at_the_pixels_that_it_should() -> None:
    """The 4 x 4 image 1 to 16 in patches of 2: [1, 2, 5, 6], [3, 4, 7, 8], ..."""
    images = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    weight = torch.eye(4).view(4, 1, 2, 2)
    want = [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]
    assert reference.patch_embed(images, weight)[0].tolist() == want


def test_patch_unembed_is_a_transposed_convolution() -> None:
    tokens, weight, bias = numbers(2, 6, 5), numbers(5, 3, 2, 4), numbers(3)
    grid = tokens.mT.unflatten(2, (2, 3))
    want = F.conv_transpose2d(grid, weight, bias, stride=(2, 4))
    got = reference.patch_unembed(tokens, weight, bias, 2, 3)
    assert_same([got], [want], [tokens, weight, bias])


# --------------------------------------------------------------------------- rows of numbers


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_is_activation_of_products(activation: str) -> None:
    x, weight, bias, residual = numbers(2, 3, 5), numbers(4, 5), numbers(4), numbers(2, 3, 4)
    want = ACTIVATIONS[activation](torch.einsum("bnk,ek->bne", x, weight) + bias) + residual
    got = reference.linear(x, weight, bias, activation, residual)[0]
    assert_same([got], [want], [x, weight, bias, residual])


def test_add_layer_norm_is_layer_norm_of_the_sum() -> None:
    x, residual, weight, bias = numbers(2, 3, 7), numbers(2, 3, 7, seed=1), numbers(7), numbers(7)
    total = x + residual
    want = (F.layer_norm(total, (7,), weight, bias, 1e-3), total)
    got = reference.add_layer_norm(x, residual, weight, bias, 1e-3)
    assert_same(got[:2], want, [x, residual, weight, bias])
    torch.testing.assert_close(got[2], total.mean(-1).flatten())
    torch.testing.assert_close(got[3], (total.var(-1, correction=0) + 1e-3).rsqrt().flatten())


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_qk_norm_rope_is_norm_then_a_rotation(norm: str, interleaved: bool) -> None:
    """Pairs as complex numbers, turned by multiplication."""
    prefix, dim = 2, 6
    query, key = numbers(2, 4, 5, dim, seed="q"), numbers(2, 2, 5, dim, seed="k")
    angle = torch.randn(1, 1, 3, dim // 2, generator=rng(0), dtype=F64)
    pairs = (
        (lambda a: a.repeat_interleave(2, -1)) if interleaved else (lambda a: torch.cat((a, a), -1))
    )
    weights = [None] * 4
    if norm != "none":
        weights = [numbers(dim, seed=s) for s in ("qw", "kw", "qb", "kb")]

    def expected(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if norm == "rms":
            x = F.rms_norm(x, (dim,), weight, 1e-4) + bias
        if norm == "layer":
            x = F.layer_norm(x, (dim,), weight, bias, 1e-4)
        rest = x[:, :, prefix:]
        if interleaved:
            real, imaginary = rest[..., 0::2], rest[..., 1::2]
        else:
            real, imaginary = rest[..., : dim // 2], rest[..., dim // 2 :]
        turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
        both = torch.stack((turned.real, turned.imag), dim=-1 if interleaved else -2).flatten(-2)
        return torch.cat((x[:, :, :prefix], both), dim=2)

    got = reference.qk_norm_rope(
        query,
        key,
        *weights,
        pairs(angle.cos()),
        pairs(angle.sin()),
        norm,
        1e-4,
        interleaved,
        prefix,
    )
    want = (expected(query, weights[0], weights[2]), expected(key, weights[1], weights[3]))
    assert_same(got, want, [query, key, *[w for w in weights if w is not None]])
