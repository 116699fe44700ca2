"""Attention on every backend: results, empty rows, layouts and gradients by the parity rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases.attention import (
    DECODING,
    DTYPES,
    NAMED,
    REPRESENTATIVE,
    SWEPT,
    Case,
    call,
    check,
    compare,
    problem,
)
from oracle import Target, explicit_gradients, explicit_pairs

from patchgen_fast import attention


@pytest.mark.representative
@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_representative(case: Case, target: Target) -> None:
    check(case, target)


@pytest.mark.parametrize("case", SWEPT, ids=str)
def test_sweep(case: Case, target: Target) -> None:
    check(case, target)


@pytest.mark.parametrize("name", NAMED)
def test_named(name: str, target: Target) -> None:
    check(NAMED[name], target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DECODING, ids=str)
def test_few_queries(case: Case, dtype: torch.dtype, target: Target) -> None:
    check(replace(case, dtype=dtype, gradients=False), target)


@pytest.mark.parametrize("case", [c for c in DECODING if c.keys > 512], ids=str)
def test_few_queries_of_few_heads_split_between_threads(case: Case) -> None:
    # One batch entry, so that threads are more than heads.
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        check(replace(case, batch=1, gradients=False), Target("cpu", "cpu"))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("forward", "backward"), explicit_pairs("attention"))
@pytest.mark.parametrize("case", [*REPRESENTATIVE, *NAMED.values(), *SWEPT[::4]], ids=str)
def test_any_backward_takes_any_forward(case: Case, forward: str, backward: str) -> None:
    stated = problem(case, "cpu")

    def by_reference(**inputs):
        return call(case, "reference", **inputs)

    compare(case, stated, explicit_gradients(stated, by_reference, forward, backward))


@pytest.mark.representative
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [-1e4, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_low_numbers_in_a_row_hide_as_false_does(head_dim, low, dtype, target: Target) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 37, head_dim, device=target.device).to(dtype)
    seen = torch.rand(37, 37, device=target.device) > 0.3
    seen[:, 0] = True
    added = torch.zeros(37, 37, device=target.device).masked_fill(~seen, low)
    expected = attention(query, key, value, seen, backend=target.backend)
    got = attention(query, key, value, added, backend=target.backend)
    torch.testing.assert_close(got, expected)
