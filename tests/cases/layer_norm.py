"""layer_norm: sizes, weights of either dtype, gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from oracle import DTYPE_NAMES, Problem, Target, carve, normal, rng
from pairwise import pairwise
from torch import Tensor

from patchgen_fast import layer_norm, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call.

    weights: ``none``, ``same``, ``float32``, ``weight`` or ``bias`` (only that). shift: added to
    every input.
    """

    rows: tuple[int, ...] = (2, 50)
    embed: int = 64
    dtype: torch.dtype = torch.float32
    weights: str = "same"
    layout: str = "contiguous"
    grad: str = "contiguous"
    eps: float = 1e-5
    shift: float = 0.0

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.rows)) or "row", f"E{self.embed}", DTYPE_NAMES[self.dtype]]
        parts += [f"weights.{self.weights}", self.layout]
        parts += [] if self.grad == "contiguous" else [f"grad.{self.grad}"]
        parts += [f"shift{self.shift}"] if self.shift else []
        parts += [f"eps{self.eps}"] if self.eps != 1e-5 else []
        return "-".join(parts)


def make_inputs(case: Case, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    generator = rng("layer_norm", case)
    shape = (*case.rows, case.embed)
    inputs: dict[str, Any] = {
        "input": carve(normal(generator, shape, case.dtype) + case.shift, case.layout, device)
    }
    dtype = torch.float32 if case.weights == "float32" else case.dtype
    for name in ("weight", "bias"):
        given = case.weights in ("same", "float32", name)
        x = normal(generator, (case.embed,), dtype) + (1 if name == "weight" else 0)
        inputs[name] = carve(x, "contiguous", device) if given else None
    if case.grad == "stride0":
        # The same row for all: the same number for all would cancel.
        grad = normal(generator, (case.embed,), case.dtype).to(device).expand(shape)
    else:
        grad = carve(normal(generator, shape, case.dtype), case.grad, device)
    return inputs, {"out": grad}


def reference_results(case: Case, arithmetic: torch.dtype, **inputs: Any) -> dict[str, Tensor]:
    out, _, _ = reference.layer_norm(**inputs, eps=case.eps, arithmetic=arithmetic)
    return {"out": out}


def call(case: Case, backend: str | None, **inputs: Any) -> dict[str, Tensor]:
    return {"out": layer_norm(**inputs, eps=case.eps, backend=backend)}


@functools.lru_cache(maxsize=64)
def problem(case: Case, device: str) -> Problem:
    inputs, cotangents = make_inputs(case, device)
    return Problem(
        "layer_norm",
        case.dtype,
        inputs,
        cotangents,
        [name for name, x in inputs.items() if x is not None],
        functools.partial(reference_results, case),
    )


def check(case: Case, target: Target) -> None:
    stated = problem(case, target.device)
    got = stated.run(target, functools.partial(call, case, target.backend))
    assert got.results["out"].dtype == case.dtype and got.results["out"].is_contiguous()
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
        }
    )
] + [
    Case(rows=(0, 5)),
    Case(rows=()),
    Case(rows=(2, 197), embed=768, dtype=torch.bfloat16, weights="float32"),
    # More than a mebibyte: kept memory.
    Case(rows=(8, 197), embed=768, dtype=torch.bfloat16),
    # The mean far above the deviation, where E[x^2] - mean^2 would lose all.
    Case(rows=(50,), embed=96, shift=100.0),
    Case(rows=(50,), embed=96, eps=0.1),
]
