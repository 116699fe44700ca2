"""linear: activations, residuals, odd sizes and layouts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from oracle import DTYPE_NAMES, Problem, Target, carve, normal, rng
from pairwise import pairwise
from torch import Tensor

from patchgen_fast import linear, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class Case:
    """One call. residual: ``none``, ``full``, ``row`` (one for all), ``broadcast`` (over the first
    dimension), ``strided``.
    """

    rows: tuple[int, ...] = (2, 50)
    inner: int = 64
    outer: int = 96
    dtype: torch.dtype = torch.float32
    activation: str | None = None
    bias: bool = True
    residual: str = "none"
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    grad: str = "contiguous"

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.rows)) or "row", f"K{self.inner}", f"N{self.outer}"]
        parts += [DTYPE_NAMES[self.dtype], self.activation or "plain", self.layout]
        parts += [] if self.weight_layout == "contiguous" else [f"weight.{self.weight_layout}"]
        parts += [] if self.bias else ["nobias"]
        parts += [] if self.residual == "none" else [f"residual.{self.residual}"]
        parts += [] if self.grad == "contiguous" else [f"grad.{self.grad}"]
        return "-".join(parts)


def make_inputs(case: Case, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    generator = rng("linear", case)
    weight = torch.randn(case.outer, case.inner, generator=generator) / case.inner**0.5
    inputs: dict[str, Any] = {
        "input": carve(
            normal(generator, (*case.rows, case.inner), case.dtype), case.layout, device
        ),
        "weight": carve(weight.to(case.dtype), case.weight_layout, device),
        "bias": None,
        "residual": None,
    }
    if case.bias:
        inputs["bias"] = carve(normal(generator, (case.outer,), case.dtype), "contiguous", device)
    shape = (*case.rows, case.outer)
    if case.residual != "none":
        of = {"row": (case.outer,), "broadcast": (1, *shape[1:])}.get(case.residual, shape)
        layout = "strided" if case.residual == "strided" else "contiguous"
        inputs["residual"] = carve(normal(generator, of, case.dtype), layout, device)
    if case.grad == "stride0":
        grad = torch.ones((), dtype=case.dtype, device=device).expand(shape)
    else:
        grad = carve(normal(generator, shape, case.dtype), case.grad, device)
    return inputs, {"out": grad}


def reference_results(case: Case, arithmetic: torch.dtype, **inputs: Any) -> dict[str, Tensor]:
    out, _ = reference.linear(**inputs, activation=case.activation or "none", arithmetic=arithmetic)
    return {"out": out}


def call(case: Case, backend: str | None, **inputs: Any) -> dict[str, Tensor]:
    return {"out": linear(**inputs, activation=case.activation, backend=backend)}


@functools.lru_cache(maxsize=64)
def problem(case: Case, device: str) -> Problem:
    inputs, cotangents = make_inputs(case, device)
    return Problem(
        "linear",
        case.dtype,
        inputs,
        cotangents,
        [name for name, x in inputs.items() if x is not None],
        functools.partial(reference_results, case),
    )


def check(case: Case, target: Target) -> None:
    stated = problem(case, target.device)
    got = stated.run(target, functools.partial(call, case, target.backend))
    out = got.results["out"]
    assert out.dtype == case.dtype and out.is_contiguous()
    stated.compare(got, target.factor)


# Rows of which one tile, some even ones, and some uneven ones are made; the last are too many.
FEW_ROWS = [
    Case(**choice)
    for choice in pairwise(
        {
            "rows": ((1,), (2,), (3, 1), (7,), (2, 4), (9,), (16,), (17,), (3, 11), (64,), (129,)),
            "inner": (0, 31, 64, 100, 515),  # 1 below: no yardstick in one number's gradient
            "outer": (1, 3, 16, 17, 70),
            "dtype": DTYPES,
            "activation": ACTIVATIONS,
            "bias": (True, False),
            "residual": ("none", "full", "row", "broadcast", "strided"),
            "layout": ("contiguous", "sliced", "strided", "batch_last"),
            "weight_layout": ("contiguous", "sliced", "strided", "batch_last"),
        }
    )
] + [
    Case(rows=(17,), inner=1, outer=33),
    # Sums that are cut into runs.
    Case(rows=(7,), inner=4133, outer=18, activation="silu"),
    Case(rows=(2,), inner=4133, outer=18, dtype=torch.float16),
    Case(rows=(3,), inner=33001, outer=5, dtype=torch.bfloat16),
    Case(rows=(5,), inner=32, outer=0),
]

CASES = [
    Case(**choice)
    for choice in pairwise(
        {
            "rows": ((1, 1), (2, 50), (3, 7, 5), (197,), (64,), (2, 201)),
            "inner": (1, 7, 33, 64, 192),
            "outer": (1, 9, 40, 64, 257),
            "dtype": DTYPES,
            "activation": ACTIVATIONS,
            "bias": (True, False),
            "residual": ("none", "full", "row", "broadcast", "strided"),
            "layout": ("contiguous", "sliced", "strided", "batch_last"),
            "weight_layout": ("contiguous", "sliced", "batch_last"),
            "grad": ("contiguous", "sliced", "stride0", "strided"),
        }
    )
] + [
    Case(rows=(0, 50), activation="gelu"),
    Case(rows=(), inner=8, outer=12, activation="silu", residual="full"),
    # Sums that are cut into runs, weights multiplied where they lie and copied.
    Case(rows=(40,), inner=4200, outer=37, activation="silu", residual="full"),
    Case(rows=(40,), inner=4133, outer=37, dtype=torch.bfloat16),
    Case(rows=(2, 197), inner=192, outer=768, activation="gelu", dtype=torch.bfloat16),
    Case(rows=(2, 197), inner=768, outer=192, residual="full", dtype=torch.bfloat16),
]
