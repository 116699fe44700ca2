"""qk_norm_rope on every backend: results and gradients by the parity rule."""

from __future__ import annotations

import pytest
from cases.qk_norm_rope import CASES, REPRESENTATIVE, Case, call, check, problem
from oracle import Target, explicit_gradients, explicit_pairs


@pytest.mark.representative
@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_representative(case: Case, target: Target) -> None:
    check(case, target)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, target: Target) -> None:
    check(case, target)


@pytest.mark.parametrize(("forward", "backward"), explicit_pairs("qk_norm_rope"))
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_any_backward_takes_any_forward(case: Case, forward: str, backward: str) -> None:
    stated = problem(case, "cpu")

    def by_reference(**inputs):
        return call(case, "reference", **inputs)

    stated.compare(explicit_gradients(stated, by_reference, forward, backward))
