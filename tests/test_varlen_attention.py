"""varlen_attention on every backend: results and gradients by the parity rule."""

from __future__ import annotations

import pytest
import torch
from cases.varlen_attention import CASES, Case, call, check, problem
from oracle import Target, explicit_gradients, explicit_pairs, require


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, target: Target) -> None:
    check(case, target)


@pytest.mark.parametrize(("forward", "backward"), explicit_pairs("varlen_attention"))
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_any_backward_takes_any_forward(case: Case, forward: str, backward: str) -> None:
    stated = problem(case, "cpu")

    def by_reference(**inputs):
        return call(case, "reference", **inputs)

    stated.compare(explicit_gradients(stated, by_reference, forward, backward))


@pytest.mark.parametrize("offsets", [[0, 40, 10, 30], [-5, 7, 9, 2**31 - 1], [3, 3, 3, 3]])
def test_offsets_that_nothing_checked_stay_within_the_tensors(offsets: list[int]) -> None:
    """Under torch.compile the offsets have no values to check: the kernel must not leave memory."""
    require("varlen_attention", Target("cpu", "cpu"))
    query, key, value = (torch.randn(20, 2, 16) for _ in range(3))
    cu = torch.tensor(offsets, dtype=torch.int32)
    raw = torch.ops.patchgen_fast_native
    out, lse = raw.varlen_attention(query, key, value, cu, cu, 20, 20, True, 0.25)
    grads = raw.varlen_attention_backward(
        torch.ones_like(out), None, query, key, value, out, lse, cu, cu, 20, 20, True, 0.25
    )
    assert out.shape == query.shape and lse.shape == (2, 20)
    assert all(x.isfinite().all() for x in (out, *grads))
