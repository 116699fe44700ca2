"""Attention on every backend: results, empty rows, layouts and gradients by the parity rule."""

from __future__ import annotations

import pytest
from cases.attention import NAMED, REPRESENTATIVE, SWEPT, Case, call, check, compare, problem
from oracle import Target, explicit_gradients, explicit_pairs


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


@pytest.mark.parametrize(("forward", "backward"), explicit_pairs("attention"))
@pytest.mark.parametrize("case", [*REPRESENTATIVE, *NAMED.values(), *SWEPT[::4]], ids=str)
def test_any_backward_takes_any_forward(case: Case, forward: str, backward: str) -> None:
    stated = problem(case, "cpu")

    def by_reference(**inputs):
        return call(case, "reference", **inputs)

    compare(case, stated, explicit_gradients(stated, by_reference, forward, backward))
