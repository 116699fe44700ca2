"""layer_norm on every backend: results and gradients by the parity rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases.layer_norm import CASES, Case, call, check, problem
from oracle import Target, explicit_gradients, explicit_pairs

from patchgen_fast import layer_norm, reference


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, target: Target) -> None:
    check(case, target)


@pytest.mark.parametrize(("forward", "backward"), explicit_pairs("layer_norm"))
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_any_backward_takes_any_forward(case: Case, forward: str, backward: str) -> None:
    stated = problem(case, "cpu")

    def by_reference(**inputs):
        return call(case, "reference", **inputs)

    stated.compare(explicit_gradients(stated, by_reference, forward, backward))


def test_the_reference_is_stock_pytorchs():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 8), torch.randn(8), torch.randn(8)
    expected = F.layer_norm(x, (8,), weight, bias, 1e-3)
    torch.testing.assert_close(reference.layer_norm(x, weight, bias, 1e-3)[0], expected)


def test_not_a_number_stays_in_its_row():
    x = torch.randn(3, 20)
    x[1, 7] = torch.nan
    got = layer_norm(x)
    assert got[1].isnan().all()
    assert not got[[0, 2]].isnan().any()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([1.0],), TypeError, "input to be a tensor"),
        ((torch.tensor(1.0),), ValueError, r"\[\.\.\., E\]"),
        ((torch.ones(2, 3, dtype=torch.int32),), TypeError, "float"),
        ((torch.ones(2, 3), torch.ones(4)), ValueError, "weight"),
        ((torch.ones(2, 3), None, torch.ones(2)), ValueError, "bias"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        layer_norm(*arguments)
