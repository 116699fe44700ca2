"""Calls drawn at random, smallest failing one shown: the parity rule anywhere in the ops' domains,
and what must hold between calls whatever their numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    add_layer_norm,
    attention,
    layer_norm,
    linear,
    patch_embed,
    patch_unembed,
    varlen_attention,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import Target, assert_parity, require

import patchgen_fast
from patchgen_fast import reference

# The same examples every time: a red run can be repeated.
drawn = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = st.sampled_from(["sliced", "strided", "batch_last"])


def size(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


@st.composite
def attention_cases(draw: Any) -> attention.Case:
    kv_heads = draw(size(1, 3))
    kinds = ["bool:plain", "bool:inf_rows", "same:plain", "same:inf_rows", "float32:min_rows"]
    mask = None
    if draw(st.booleans()):
        mask = f"{draw(st.sampled_from(kinds))}:{draw(st.sampled_from(attention.MASK_SHAPES))}"
    return attention.Case(
        nq=draw(size(1, 90)),
        nk=draw(st.none() | size(2, 90)),
        dim=draw(size(8, 130)),
        dtype=draw(DTYPES),
        batch=draw(size(1, 3)),
        heads=(kv_heads * draw(size(1, 3)), kv_heads),
        mask=mask,
        causal=draw(st.sampled_from(["none", "plain", "bottom_right", "tensor"])),
        lengths=draw(st.booleans()),
        layout=draw(st.sampled_from(["packed", "dense", "expanded"]) | LAYOUTS),
        grad=draw(st.sampled_from(["contiguous", "permuted", "stride0"])),
        lse=draw(st.booleans()),
    )


@drawn
@given(case=attention_cases())
def test_attention_of_anything(target: Target, case: attention.Case) -> None:
    attention.check(case, target)


@drawn
@given(
    lengths=st.lists(st.tuples(size(0, 40), size(0, 40)), max_size=5),
    dim=size(8, 96),
    dtype=DTYPES,
    is_causal=st.booleans(),
    spare=size(0, 3),
)
def test_varlen_attention_of_anything(
    target: Target, lengths: list, dim: int, dtype: torch.dtype, is_causal: bool, spare: int
) -> None:
    rows, keys = (tuple(pair[i] for pair in lengths) for i in (0, 1))
    # Enough numbers for a yardstick: of a few rows that see one key each, eager is exact.
    assume(all(n == 0 or m == 0 or min(n, m) > 8 for n, m in lengths))
    case = varlen_attention.Case(
        rows, keys, dim=dim, dtype=dtype, is_causal=is_causal, spare=spare, heads=(4, 2)
    )
    varlen_attention.check(case, target)


@st.composite
def patch_embed_cases(draw: Any) -> patch_embed.Case:
    patch = draw(st.tuples(size(1, 17), size(1, 17)))
    grid = draw(st.tuples(size(1, 4), size(1, 4)))
    pixels = tuple(p * n + draw(size(0, p - 1)) for p, n in zip(patch, grid, strict=True))
    return patch_embed.Case(
        pixels,
        patch,
        embed=draw(size(4, 70)),
        channels=draw(size(1, 4)),
        batch=draw(size(1, 3)),
        dtype=draw(DTYPES),
        images=draw(st.sampled_from(["float32", "same", "uint8"])),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "sliced", "flipped_axes"])),
        bias=draw(st.booleans()),
        pos=draw(st.sampled_from(["none", "ne", "1ne"])),
        prefix=draw(size(0, 2)),
        stats=draw(st.sampled_from(["none", "floats", "tensor"])),
    )


@drawn
@given(case=patch_embed_cases())
def test_patch_embed_of_anything(target: Target, case: patch_embed.Case) -> None:
    patch_embed.check(case, target)


@drawn
@given(
    grid=st.tuples(size(1, 5), size(1, 5)),
    patch=st.tuples(size(1, 9), size(1, 9)),
    embed=size(4, 50),
    dtype=DTYPES,
    layout=LAYOUTS,
)
def test_patch_unembed_of_anything(
    target: Target, grid: tuple, patch: tuple, embed: int, dtype: torch.dtype, layout: str
) -> None:
    case = patch_unembed.Case(grid, patch, embed=embed, dtype=dtype, layout=layout)
    patch_unembed.check(case, target)


@drawn
@given(
    rows=st.lists(size(1, 9), max_size=3).map(tuple),
    inner=size(1, 80),
    outer=size(4, 80),
    dtype=DTYPES,
    activation=st.sampled_from(linear.ACTIVATIONS),
    residual=st.sampled_from(["none", "full", "row"]),
    layout=LAYOUTS,
)
def test_linear_of_anything(target: Target, layout: str, **fields: Any) -> None:
    linear.check(linear.Case(layout=layout, **fields), target)


NORMS = {
    "rows": st.tuples(size(2, 9), size(2, 9)),
    "embed": size(8, 200),
    "dtype": DTYPES,
    "weights": st.sampled_from(["none", "same", "float32"]),
    "layout": LAYOUTS,
}


@drawn
@given(**NORMS)
def test_layer_norm_of_anything(target: Target, layout: str, **fields: Any) -> None:
    layer_norm.check(layer_norm.Case(layout=layout, **fields), target)


@drawn
@given(**NORMS)
def test_add_layer_norm_of_anything(target: Target, layout: str, **fields: Any) -> None:
    add_layer_norm.check(add_layer_norm.Case(layout=layout, **fields), target)


# --------------------------------------------------------------------- between one call and another


def qkv(nq: int, nk: int, dim: int, target: Target) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(nq * 1000 + nk * 10 + dim)
    # Many heads, since the largest of few errors is a matter of luck.
    sizes = [(4, 8, n, dim) for n in (nq, nk, nk)]
    return [torch.randn(shape, generator=generator).to(target.device) for shape in sizes]


def exact(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any, Any]:
    """Eager in float32 and the truth, out and log-sum-exp each."""
    scale = query.shape[-1] ** -0.5
    eager = reference.attention(query, key, value, scale=scale)
    wide = (x.double() for x in (query, key, value))
    return (*eager, *reference.attention(*wide, scale=scale))


@drawn
@given(nq=size(1, 70), nk=size(2, 70), dim=size(8, 80), part=st.floats(0.1, 0.9))
def test_two_parts_of_the_keys_join_by_their_log_sum_exps(
    target: Target, nq: int, nk: int, dim: int, part: float
) -> None:
    """What split keys, a cache and ring attention rest on."""
    require("attention", target)
    query, key, value = qkv(nq, nk, dim, target)
    cut = max(1, min(nk - 1, int(part * nk)))
    halves = [
        patchgen_fast.attention(
            query, key[:, :, keys], value[:, :, keys], return_lse=True, backend=target.backend
        )
        for keys in (slice(0, cut), slice(cut, nk))
    ]
    lse = torch.logaddexp(halves[0][1], halves[1][1])
    joined = sum(out * (part_lse - lse).exp().unsqueeze(-1) for out, part_lse in halves)
    eager, eager_lse, truth, truth_lse = exact(query, key, value)
    # Each half is rounded, and so is their join.
    assert_parity(joined, eager, truth, "out", factor=2 * target.factor)
    assert_parity(lse, eager_lse, truth_lse, "lse", factor=2 * target.factor)


@drawn
@given(nq=size(1, 70), nk=size(2, 70), dim=size(8, 80), unseen=size(1, 60))
def test_keys_that_nobody_sees_change_nothing(
    target: Target, nq: int, nk: int, dim: int, unseen: int
) -> None:
    """By length and by mask, whatever is in them."""
    require("attention", target)
    query, key, value = qkv(nq, nk, dim, target)
    filler = torch.full((4, 8, unseen, dim), 1e4, device=target.device)
    longer = [torch.cat((x, filler), dim=2) for x in (key, value)]
    seen = torch.arange(nk + unseen, device=target.device) < nk
    eager, _, truth, _ = exact(query, key, value)
    for hidden in (
        {"kv_lengths": torch.full((4,), nk, device=target.device)},
        {"attn_mask": seen[None]},
        {"attn_mask": torch.where(seen, 0.0, -torch.inf)[None]},
    ):
        got = patchgen_fast.attention(query, *longer, **hidden, backend=target.backend)
        assert_parity(got, eager, truth, str(list(hidden)), factor=target.factor)


@drawn
@given(n=size(2, 70), dim=size(8, 80))
def test_a_query_alone_with_its_offset_is_its_row_of_all(target: Target, n: int, dim: int) -> None:
    """A cache's step: the last query of a causal whole, asked for by itself."""
    require("attention", target)
    query, key, value = qkv(n, n, dim, target)
    step = patchgen_fast.attention(
        query[:, :, -1:], key, value, is_causal=True, query_offset=n - 1, backend=target.backend
    )
    eager, _, truth, _ = exact(query[:, :, -1:], key, value)
    assert_parity(step, eager, truth, "the last row", factor=target.factor)
    whole = patchgen_fast.attention(query, key, value, is_causal=True, backend=target.backend)
    assert_parity(whole[:, :, -1:], eager, truth, "the whole's", factor=target.factor)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_embedding_patches_then_drawing_them_gives_the_image_back(
    target: Target, layout: str
) -> None:
    """With an orthogonal weight, the one op is the other's inverse."""
    require("patch_embed", target)
    require("patch_unembed", target)
    generator = torch.Generator().manual_seed(1)
    square = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=generator))[0]
    weight = square.float().view(48, 3, 4, 4).to(target.device)
    images = torch.rand(2, 3, 20, 28, generator=generator).to(target.device)
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    tokens = patchgen_fast.patch_embed(images, weight, backend=target.backend)
    back = patchgen_fast.patch_unembed(tokens, weight, grid_size=(5, 7), backend=target.backend)
    eager = reference.patch_unembed(reference.patch_embed(images, weight), weight, None, 5, 7)
    assert_parity(back, eager, images.double(), "image", factor=target.factor)
