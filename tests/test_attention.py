"""Attention on every backend: results, empty rows, layouts and gradients by the parity rule."""

from __future__ import annotations

import pytest
from cases.attention import NAMED, REPRESENTATIVE, SWEPT, Case, check
from oracle import Target


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
