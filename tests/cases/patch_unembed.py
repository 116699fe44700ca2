"""patch_unembed: grids, patch sides, dtypes and layouts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from oracle import DTYPE_NAMES, Problem, Target, carve, normal, rng
from pairwise import pairwise
from torch import Tensor

from patchgen_fast import patch_unembed, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call; layout is that of the tokens."""

    grid: tuple[int, int] = (3, 4)
    patch: tuple[int, int] = (8, 8)
    embed: int = 64
    channels: int = 3
    batch: int = 2
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    bias: bool = True
    grad: str = "contiguous"

    def __str__(self) -> str:
        parts = [f"{self.grid[0]}x{self.grid[1]}", f"p{self.patch[0]}x{self.patch[1]}"]
        parts += [f"B{self.batch}", f"C{self.channels}", f"E{self.embed}"]
        parts += [DTYPE_NAMES[self.dtype], self.layout]
        parts += [] if self.bias else ["nobias"]
        parts += [] if self.grad == "contiguous" else [f"grad.{self.grad}"]
        return "-".join(parts)


def make_inputs(case: Case, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    generator = rng("patch_unembed", case)
    (rows, columns), (height, width) = case.grid, case.patch
    tokens = normal(generator, (case.batch, rows * columns, case.embed), case.dtype)
    weight = torch.randn(case.embed, case.channels, height, width, generator=generator)
    inputs: dict[str, Any] = {
        "tokens": carve(tokens, case.layout, device),
        "weight": carve((weight / case.embed**0.5).to(case.dtype), "contiguous", device),
        "bias": None,
    }
    if case.bias:
        bias = normal(generator, (case.channels,), case.dtype)
        inputs["bias"] = carve(bias, "contiguous", device)
    shape = (case.batch, case.channels, rows * height, columns * width)
    if case.grad == "stride0":
        grad = torch.ones((), dtype=case.dtype, device=device).expand(shape)
    else:
        grad = carve(normal(generator, shape, case.dtype), case.grad, device)
    return inputs, {"images": grad}


def reference_results(case: Case, arithmetic: torch.dtype, **inputs: Any) -> dict[str, Tensor]:
    return {
        "images": reference.patch_unembed(
            **inputs, grid_h=case.grid[0], grid_w=case.grid[1], arithmetic=arithmetic
        )
    }


def call(case: Case, backend: str | None, **inputs: Any) -> dict[str, Tensor]:
    return {"images": patch_unembed(**inputs, grid_size=case.grid, backend=backend)}


@functools.lru_cache(maxsize=64)
def problem(case: Case, device: str) -> Problem:
    inputs, cotangents = make_inputs(case, device)
    return Problem(
        "patch_unembed",
        case.dtype,
        inputs,
        cotangents,
        [name for name, x in inputs.items() if x is not None],
        functools.partial(reference_results, case),
    )


def check(case: Case, target: Target) -> None:
    stated = problem(case, target.device)
    got = stated.run(target, functools.partial(call, case, target.backend))
    assert got.results["images"].dtype == case.dtype
    assert got.results["images"].is_contiguous()
    stated.compare(got, target.factor)


CASES = [
    Case(**choice)
    for choice in pairwise(
        {
            "grid": ((1, 1), (1, 5), (4, 3), (7, 9)),
            "patch": ((1, 1), (2, 2), (4, 10), (14, 14), (16, 16), (32, 32)),
            "embed": (1, 7, 33, 96),
            "channels": (1, 3, 4),
            "batch": (1, 3),
            "dtype": DTYPES,
            "layout": ("contiguous", "sliced", "strided", "batch_last"),
            "bias": (True, False),
            "grad": ("contiguous", "permuted", "stride0", "sliced"),
        }
    )
] + [Case(batch=0), Case(embed=192, patch=(16, 16), dtype=torch.bfloat16)]
