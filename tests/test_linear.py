"""linear on every backend: results and gradients by the parity rule."""

from __future__ import annotations

import pytest
import torch
from cases.linear import CASES, Case, call, check, problem
from oracle import Target, explicit_gradients, explicit_pairs, require

from patchgen_fast import dispatch, linear
from patchgen_fast.ops.linear import FEW_ROWS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, target: Target) -> None:
    check(case, target)


@pytest.mark.parametrize(("forward", "backward"), explicit_pairs("linear"))
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_any_backward_takes_any_forward(case: Case, forward: str, backward: str) -> None:
    stated = problem(case, "cpu")

    def by_reference(**inputs):
        return call(case, "reference", **inputs)

    stated.compare(explicit_gradients(stated, by_reference, forward, backward))


@pytest.mark.parametrize("dtype", FEW_ROWS, ids=str)
def test_few_rows_are_left_to_torch(dtype: torch.dtype) -> None:
    require("linear", Target("cpu", "cpu"))
    for rows, backend in ((FEW_ROWS[dtype] - 1, "torch"), (FEW_ROWS[dtype], "cpu")):
        with dispatch.counting() as ran:
            linear(torch.randn(1, rows, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype))
        assert ran == {f"linear.{backend}": 1}
