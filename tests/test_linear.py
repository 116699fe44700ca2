"""linear on every backend: results and gradients by the parity rule."""

from __future__ import annotations

import pytest
import torch
from cases.linear import CASES, FEW_ROWS, Case, call, check, problem
from oracle import Target, explicit_gradients, explicit_pairs, require

from patchgen_fast import _native, dispatch, linear, reference
from patchgen_fast.ops.linear import LEAST_TO_LEARN, MOST_ROWS_OF_BASELINE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, target: Target) -> None:
    check(case, target)


@pytest.mark.representative
@pytest.mark.parametrize("case", FEW_ROWS, ids=str)
def test_few_rows(case: Case, target: Target) -> None:
    check(case, target)


@pytest.mark.parametrize(("forward", "backward"), explicit_pairs("linear"))
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_any_backward_takes_any_forward(case: Case, forward: str, backward: str) -> None:
    stated = problem(case, "cpu")

    def by_reference(**inputs):
        return call(case, "reference", **inputs)

    stated.compare(explicit_gradients(stated, by_reference, forward, backward))


def backend_of(rows: int, dtype: torch.dtype, learns: bool, features: int = 16) -> str:
    weight = torch.randn(features, features, dtype=dtype, requires_grad=learns)
    with dispatch.counting() as ran:
        linear(torch.randn(1, rows, features, dtype=dtype), weight)
    (only,) = ran
    return only.removeprefix("linear.")


def test_what_is_left_to_torch_where_gradients_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 one row, and what is small."""
    require("linear", Target("cpu", "cpu"))
    monkeypatch.setattr(_native, "is_baseline", lambda: False)
    enough = LEAST_TO_LEARN // 16**2
    assert backend_of(enough - 1, torch.float32, True) == "torch"
    assert backend_of(enough, torch.float32, True) == "cpu"
    assert backend_of(1, torch.float32, True, 2048) == "torch"
    assert backend_of(1, torch.bfloat16, True) == "cpu"
    assert backend_of(1, torch.float32, False) == "cpu"


@pytest.mark.parametrize("gradients", [True, False])
def test_what_is_left_to_torch_without_avx2(
    gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where gradients could be wanted, and on the short way where they can't."""
    require("linear", Target("cpu", "cpu"))
    most = MOST_ROWS_OF_BASELINE
    with torch.set_grad_enabled(gradients):
        for baseline, backend in ((False, "cpu"), (True, "torch")):
            monkeypatch.setattr(_native, "is_baseline", lambda baseline=baseline: baseline)
            assert backend_of(most, torch.float32, False) == "cpu"
            assert backend_of(most + 1, torch.float32, False) == backend
            assert backend_of(most + 1, torch.bfloat16, False) == "cpu"


@pytest.mark.parametrize("rows", [5, 40])
def test_threads_share_few_rows(rows: int) -> None:
    """Every split of the outputs gives the same bits."""
    require("linear", Target("cpu", "cpu"))
    inputs = torch.randn(rows, 515), torch.randn(999, 515), torch.randn(999)
    alone = linear(*inputs, activation="gelu", backend="cpu")
    threads = torch.get_num_threads()
    try:
        for torch_threads in (2, 3, 7):
            torch.set_num_threads(torch_threads)
            assert torch.equal(linear(*inputs, activation="gelu", backend="cpu"), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_every_number_of_16_bits_is_activated(activation: str, dtype: torch.dtype) -> None:
    """Rounded to within 0.6 units in the last place, whether outputs fill a panel or not."""
    require("linear", Target("cpu", "cpu"))
    number = torch.finfo(dtype)
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    # Products of bfloat16 take what is below the normal numbers for 0, and give 0 there.
    numbers = numbers[(numbers.abs() <= 20) & (numbers.abs() >= 4 * number.tiny)].unsqueeze(1)
    one = torch.ones(1, 1, dtype=torch.float64)
    truth, _ = reference.linear(numbers.double(), one, activation=activation)
    _, exponent = torch.frexp(truth)
    unit = number.eps * torch.exp2(exponent.double() - 1).clamp_min(number.tiny)
    # There gelu is above -1e-8, and less is asked of it.
    tail = ((numbers < -6) & ("gelu" in activation)).squeeze(1)
    for outputs in (48, 1):
        weight = torch.ones(outputs, 1, dtype=dtype)
        got = linear(numbers, weight, activation=activation, backend="cpu")
        error = (got.double() - truth).abs()
        assert (error / unit)[~tail].max() <= 0.6
        assert (error[tail] <= 1e-8).all()
