"""add_layer_norm: sizes, weights of either dtype, both results' gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from oracle import DTYPE_NAMES, Problem, Target, carve, normal, rng
from pairwise import pairwise
from torch import Tensor

from patchgen_fast import add_layer_norm, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call.

    weights: ``none``, ``same``, ``float32``, ``weight`` or ``bias`` (only that). used: the results
    that gradients come through, ``both``, ``normalised`` or ``sum``. shift: added to every input.
    """

    rows: tuple[int, ...] = (2, 50)
    embed: int = 64
    dtype: torch.dtype = torch.float32
    weights: str = "same"
    layout: str = "contiguous"
    grad: str = "contiguous"
    used: str = "both"
    eps: float = 1e-5
    shift: float = 0.0

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.rows)) or "row", f"E{self.embed}", DTYPE_NAMES[self.dtype]]
        parts += [f"weights.{self.weights}", self.layout, f"grads.{self.used}"]
        parts += [] if self.grad == "contiguous" else [f"grad.{self.grad}"]
        parts += [f"shift{self.shift}"] if self.shift else []
        parts += [f"eps{self.eps}"] if self.eps != 1e-5 else []
        return "-".join(parts)


def make_inputs(case: Case, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    generator = rng("add_layer_norm", case)
    shape = (*case.rows, case.embed)
    inputs: dict[str, Any] = {
        name: carve(normal(generator, shape, case.dtype) + case.shift, case.layout, device)
        for name in ("input", "residual")
    }
    dtype = torch.float32 if case.weights == "float32" else case.dtype
    for name in ("weight", "bias"):
        given = case.weights in ("same", "float32", name)
        x = normal(generator, (case.embed,), dtype) + (1 if name == "weight" else 0)
        inputs[name] = carve(x, "contiguous", device) if given else None
    cotangents = {}
    for name in ("normalised", "sum"):
        grad = carve(normal(generator, shape, case.dtype), "contiguous", device)
        if case.grad == "stride0":
            # The same row for all: the same number for all would cancel.
            grad = normal(generator, (case.embed,), case.dtype).to(device).expand(shape)
        elif case.grad != "contiguous":
            grad = carve(grad, case.grad, device)
        if case.used in ("both", name):
            cotangents[name] = grad
    return inputs, cotangents


def reference_results(case: Case, arithmetic: torch.dtype, **inputs: Any) -> dict[str, Tensor]:
    found = reference.add_layer_norm(**inputs, eps=case.eps, arithmetic=arithmetic)
    return {"normalised": found[0], "sum": found[1]}


def call(case: Case, backend: str | None, **inputs: Any) -> dict[str, Tensor]:
    normalised, total = add_layer_norm(**inputs, eps=case.eps, backend=backend)
    return {"normalised": normalised, "sum": total}


@functools.lru_cache(maxsize=64)
def problem(case: Case, device: str) -> Problem:
    inputs, cotangents = make_inputs(case, device)
    wanted = [name for name, x in inputs.items() if x is not None]
    if case.used == "sum":
        wanted = ["input", "residual"]
    return Problem(
        "add_layer_norm",
        case.dtype,
        inputs,
        cotangents,
        wanted,
        functools.partial(reference_results, case),
    )


def check(case: Case, target: Target) -> None:
    stated = problem(case, target.device)
    got = stated.run(target, functools.partial(call, case, target.backend))
    for out in got.results.values():
        assert out.dtype == case.dtype and out.is_contiguous()
    # F.layer_norm on the CPU sums these in their own dtype, row by row: 12 % off in bfloat16.
    stated.compare(got, target.factor, ["weight", "bias"] if target.backend == "torch" else [])


CASES = [
    Case(**choice)
    for choice in pairwise(
        {
            "rows": ((1,), (2, 50), (3, 7, 5), (197,)),
            "embed": (4, 7, 33, 64, 192, 769, 1024),
            "dtype": DTYPES,
            "weights": ("same", "float32", "none", "weight", "bias"),
            "layout": ("contiguous", "sliced", "strided", "batch_last"),
            "grad": ("contiguous", "sliced", "stride0", "strided"),
            "used": ("both", "normalised", "sum"),
        }
    )
] + [
    Case(rows=(0, 5)),
    Case(rows=()),
    # One number normalises to 0, two to 1 and -1: no gradient is left but that of the sum.
    Case(rows=(50,), embed=1, used="sum"),
    Case(rows=(50,), embed=2, used="sum", dtype=torch.bfloat16),
    Case(rows=(2, 197), embed=768, dtype=torch.bfloat16, weights="float32"),
    # The mean far above the deviation, where E[x^2] - mean^2 would lose all.
    Case(rows=(50,), embed=96, shift=100.0),
    Case(rows=(50,), embed=96, eps=0.1),
]
