"""Dispatch: the fastest that accepts, the named one or its reasons; calls are counted."""

from __future__ import annotations

import threading

import pytest
import torch

from patchgen_fast import attention, dispatch, linear
from patchgen_fast.dispatch import BACKENDS, BackendRefused, Refusal
from patchgen_fast.ops.attention import OP
from patchgen_fast.registry import OPS

QKV = [torch.randn(1, 2, 5, 8) for _ in range(3)]


def test_a_refusal_carries_its_backend_and_reason() -> None:
    with pytest.raises(BackendRefused) as caught:
        attention(*(x.double() for x in QKV), backend="torch")
    assert caught.value.backend == "torch"
    assert caught.value.refusal.code == "float64"


def test_a_refusal_names_the_arguments_and_every_backends_answer() -> None:
    with pytest.raises(BackendRefused) as caught:
        attention(*(x.double() for x in QKV), backend="torch")
    text = str(caught.value)
    assert "query: [1, 2, 5, 8] torch.float64 on cpu, strides (80, 40, 8, 1)" in text
    for backend in BACKENDS:
        assert f"  {backend}: " in text
    assert "reference: accepts" in text
    assert "Pass backend=None" in text


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected backend to be None or one of .*; got 'gpu'"):
        attention(*QKV, backend="gpu")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_what_ran_is_counted_and_only_that(backend: str) -> None:
    with dispatch.counting() as ran:
        attention(*QKV, backend=backend)
        attention(*QKV, backend=backend)
    assert ran == {f"attention.{backend}": 2}


def test_none_takes_the_first_that_accepts() -> None:
    """By the order of preference; what refuses is passed over, and what runs is what was chosen."""
    with dispatch.counting() as ran:
        attention(*QKV)
    first = next(
        name for name in ("cpu", "torch", "reference") if OP.backends[name].unavailable is None
    )
    assert ran == {f"attention.{first}": 1}
    with dispatch.counting() as ran:
        attention(*(x.double() for x in QKV))
    assert ran == {"attention.reference": 1}
    with dispatch.counting() as ran:
        attention(*QKV, dropout_p=0.5)
    assert ran == {"attention.torch": 1}


X, WEIGHT = torch.randn(3, 5, 8), torch.randn(6, 8)
CALLS = {
    "attention": lambda: attention(*QKV),
    "causal, scaled": lambda: attention(*QKV, is_causal=True, scale=0.3),
    "from an offset": lambda: attention(*QKV, is_causal=True, query_offset=1),
    "masked": lambda: attention(*QKV, attn_mask=torch.eye(QKV[0].shape[2], dtype=torch.bool)),
    "with its log-sum-exp": lambda: attention(*QKV, return_lse=True),
    "in float64": lambda: attention(*(x.double() for x in QKV)),
    "D of 300": lambda: attention(*(x.repeat(1, 1, 1, 38)[..., :300] for x in QKV)),
    "D strided": lambda: attention(*(x.repeat_interleave(2, -1)[..., ::2] for x in QKV)),
    "linear": lambda: linear(X, WEIGHT),
    "with activation": lambda: linear(X, WEIGHT, X[0, 0, :6], activation="gelu"),
    "with residual": lambda: linear(X, WEIGHT, residual=X[..., :6]),
    "with residual, broadcast": lambda: linear(X, WEIGHT, residual=X[0, :, :6]),
    "linear in float64": lambda: linear(X.double(), WEIGHT.double()),
    "weight transposed": lambda: linear(X, WEIGHT.T.contiguous().T),
    "named": lambda: linear(X, WEIGHT, backend="torch"),
}


@pytest.mark.parametrize("cast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_short_way_without_gradients_ends_where_the_long_one_does(call, cast: bool) -> None:
    with torch.autocast("cpu", enabled=cast):
        with dispatch.counting() as long:
            wanted = call()
        with dispatch.counting() as short, torch.no_grad():
            got = call()
    assert short == long
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_a_table_of_preference_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OP, "prefer", lambda args: "reference" if args[0].shape[2] < 9 else None)
    with dispatch.counting() as ran:
        attention(*QKV)
    assert ran == {"attention.reference": 1}


def test_no_backend_at_all_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in OP.backends.values():
        monkeypatch.setattr(
            backend, "refuses", (Refusal("never", "it never runs", lambda a: True),)
        )
    with pytest.raises(BackendRefused, match="no backend accepts") as caught:
        attention(*QKV)
    assert "reference: it never runs" in str(caught.value)


@pytest.mark.parametrize("name", ["attention", "varlen_attention", "qk_norm_rope", "patch_embed",
                                  "patch_unembed", "linear", "layer_norm",
                                  "add_layer_norm"])  # fmt: skip
def test_every_op_has_a_reference_a_composition_and_reasons_for_the_rest(name: str) -> None:
    import patchgen_fast

    assert callable(getattr(patchgen_fast, name))
    backends = OPS[name].backends
    assert set(backends) == set(BACKENDS)
    for backend in ("reference", "torch"):
        assert backends[backend].unavailable is None
    for backend in backends.values():
        assert backend.unavailable is None or backend.unavailable.strip()


def test_counting_is_exact_under_threads() -> None:
    def work() -> None:
        for _ in range(25):
            attention(*QKV, backend="reference")

    with dispatch.counting() as ran:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert ran == {"attention.reference": 100}


def test_reset_starts_from_zero() -> None:
    attention(*QKV, backend="reference")
    assert dispatch.counters()["attention.reference"] >= 1
    dispatch.reset_counters()
    assert dispatch.counters() == {}
