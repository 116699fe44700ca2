"""patch_embed: patch and image sizes, memory formats, bytes, statistics, positions and prefixes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from oracle import DTYPE_NAMES, Problem, Target, carve, normal, rng
from pairwise import pairwise
from torch import Tensor

from patchgen_fast import patch_embed, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call.

    size: pixels of every axis, (T,) H, W. images: ``float32``, ``same`` as weight, or ``uint8``.
    layout: ``contiguous``, ``channels_last``, ``sliced``, ``strided``, ``expanded`` (one grey plane
    as all the channels, stride 0), ``flipped_axes`` (H and W swapped in memory).
    stats: ``none``, ``floats``, ``list``, ``tensor``, ``mean`` or ``std`` (only that).
    """

    size: tuple[int, ...] = (32, 32)
    patch: tuple[int, ...] = (16, 16)
    embed: int = 64
    channels: int = 3
    batch: int = 2
    dtype: torch.dtype = torch.float32
    images: str = "float32"
    layout: str = "contiguous"
    bias: bool = True
    pos: str = "none"
    prefix: int = 0
    stats: str = "none"
    grad: str = "contiguous"

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.size)), "p" + "x".join(map(str, self.patch))]
        parts += [f"B{self.batch}", f"C{self.channels}", f"E{self.embed}"]
        parts += [DTYPE_NAMES[self.dtype], self.images, self.layout]
        parts += [] if self.bias else ["nobias"]
        parts += [] if self.pos == "none" else [f"pos.{self.pos}"]
        parts += [f"prefix{self.prefix}"] if self.prefix else []
        parts += [] if self.stats == "none" else [f"stats.{self.stats}"]
        parts += [] if self.grad == "contiguous" else [f"grad.{self.grad}"]
        return "-".join(parts)


def make_images(case: Case, generator: torch.Generator, device: str) -> Tensor:
    shape = (case.batch, 1 if case.layout == "expanded" else case.channels, *case.size)
    if case.images == "uint8":
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    else:
        dtype = case.dtype if case.images == "same" else torch.float32
        pixels = normal(generator, shape, dtype)
    if case.layout == "channels_last":
        last = carve(pixels.movedim(1, -1), "contiguous", device)
        return last.movedim(-1, 1)
    if case.layout == "flipped_axes":
        return carve(pixels.transpose(-1, -2), "contiguous", device).transpose(-1, -2)
    if case.layout == "expanded":
        plane = carve(pixels, "contiguous", device)
        return plane.expand(case.batch, case.channels, *case.size)
    return carve(pixels, case.layout, device)


def make_inputs(case: Case, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    generator = rng("patch_embed", case)
    images = make_images(case, generator, device)
    # Weights as a trained model's: the sums stay near 1.
    fan_in = case.channels * torch.Size(case.patch).numel()
    weight = torch.randn(case.embed, case.channels, *case.patch, generator=generator)
    tokens = torch.Size([n // p for n, p in zip(case.size, case.patch, strict=True)]).numel()
    inputs: dict[str, Any] = {
        "images": images,
        "weight": carve((weight / fan_in**0.5).to(case.dtype), "contiguous", device),
        "bias": None,
        "pos_embed": None,
        "prefix": None,
    }
    if case.bias:
        inputs["bias"] = carve(normal(generator, (case.embed,), case.dtype), "contiguous", device)
    if case.pos != "none":
        shape = (tokens, case.embed) if case.pos == "ne" else (1, tokens, case.embed)
        layout = "sliced" if case.pos == "sliced" else "contiguous"
        inputs["pos_embed"] = carve(normal(generator, shape, case.dtype), layout, device)
    if case.prefix:
        shape = (case.prefix, case.embed) if case.prefix % 2 else (1, case.prefix, case.embed)
        inputs["prefix"] = carve(normal(generator, shape, case.dtype), "contiguous", device)
    inputs |= statistics(case, device)
    shape = (case.batch, case.prefix + tokens, case.embed)
    if case.grad == "stride0":
        grad = torch.ones((), dtype=case.dtype, device=device).expand(shape)
    else:
        grad = carve(normal(generator, shape, case.dtype), case.grad, device)
    return inputs, {"out": grad}


def statistics(case: Case, device: str) -> dict[str, Any]:
    means = [0.485 - 0.03 * c for c in range(case.channels)]
    stds = [0.229 + 0.05 * c for c in range(case.channels)]
    if case.stats == "floats":
        return {"mean": 0.5, "std": 0.25}
    if case.stats == "list":
        return {"mean": means, "std": tuple(stds)}
    tensors = {"mean": torch.tensor(means, device=device), "std": torch.tensor(stds, device=device)}
    return {name: x if case.stats in ("tensor", name) else None for name, x in tensors.items()}


def reference_results(case: Case, arithmetic: torch.dtype, **inputs: Any) -> dict[str, Tensor]:
    args = dict(inputs)
    for name in ("pos_embed", "prefix"):
        if args[name] is not None and args[name].dim() == 3:
            args[name] = args[name].squeeze(0)
    device = args["images"].device
    for name in ("mean", "std"):
        if isinstance(args[name], float):
            args[name] = [args[name]] * case.channels
        if isinstance(args[name], (list, tuple)):
            args[name] = torch.tensor(args[name], dtype=torch.float32, device=device)
    return {"out": reference.patch_embed(**args, arithmetic=arithmetic)}


def call(case: Case, backend: str | None, **inputs: Any) -> dict[str, Tensor]:
    images, weight, bias = (inputs.pop(name) for name in ("images", "weight", "bias"))
    return {"out": patch_embed(images, weight, bias, **inputs, backend=backend)}


@functools.lru_cache(maxsize=64)
def problem(case: Case, device: str) -> Problem:
    inputs, cotangents = make_inputs(case, device)
    wanted = [
        name
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.is_floating_point() and name not in ("mean", "std")
    ]
    return Problem(
        "patch_embed",
        case.dtype,
        inputs,
        cotangents,
        wanted,
        functools.partial(reference_results, case),
    )


def check(case: Case, target: Target) -> None:
    stated = problem(case, target.device)
    got = stated.run(target, functools.partial(call, case, target.backend))
    out = got.results["out"]
    assert out.dtype == case.dtype and out.is_contiguous()
    if "images" in got.grads:
        check_margins(case, got.grads["images"])
    stated.compare(got, target.factor)


def check_margins(case: Case, grad: Tensor) -> None:
    """Pixels that fill no patch have no gradient."""
    for axis, (n, p) in enumerate(zip(case.size, case.patch, strict=True)):
        margin = grad.narrow(2 + axis, n // p * p, n % p)
        assert (margin == 0).all(), f"pixels beyond the last patch of axis {axis} have a gradient"


_SIZES = {
    2: ((8, 10), (9, 7)),
    4: ((16, 20), (19, 17)),
    7: ((14, 21), (20, 15)),
    8: ((32, 24), (35, 25)),
    14: ((28, 42), (43, 30)),
    16: ((48, 32), (50, 47)),
    32: ((64, 32), (65, 40)),
}


def _cases() -> list[Case]:
    choices = pairwise(
        {
            "side": tuple(_SIZES),
            "whole": (True, False),
            "embed": (7, 15, 33, 64, 96, 192),
            "channels": (1, 3, 4),
            "batch": (1, 3),
            "dtype": DTYPES,
            "images": ("float32", "same", "uint8"),
            "layout": (
                "contiguous", "channels_last", "sliced", "strided", "expanded", "flipped_axes",
            ),
            "bias": (True, False),
            "pos": ("none", "ne", "1ne", "sliced"),
            "prefix": (0, 1, 4),
            "stats": ("none", "floats", "list", "tensor", "mean", "std"),
            "grad": ("contiguous", "permuted", "stride0", "sliced"),
        }
    )  # fmt: skip
    cases = []
    for choice in choices:
        side, whole = choice.pop("side"), choice.pop("whole")
        cases.append(Case(size=_SIZES[side][0 if whole else 1], patch=(side, side), **choice))
    return cases


NAMED = {
    "one patch": Case((16, 16)),
    "one patch of one pixel": Case((1, 1), (1, 1), embed=5),
    "patches of one pixel": Case((7, 9), (1, 1), embed=8, layout="channels_last"),
    "one number a patch": Case((16, 20), (4, 4), embed=1, pos="ne", prefix=1),
    "one number a patch, from bytes": Case(
        (32, 24),
        (8, 8),
        embed=1,
        channels=4,
        batch=1,
        images="uint8",
        layout="channels_last",
        bias=False,
        pos="sliced",
        prefix=1,
        stats="std",
        grad="permuted",
    ),
    "one number a patch, bf16": Case((32, 24), (8, 8), embed=1, dtype=torch.bfloat16),
    "one number a patch, f16": Case((28, 42), (14, 14), embed=1, dtype=torch.float16),
    "oblong patches": Case((33, 30), (4, 10), embed=24),
    "a patch a column": Case((24, 9), (24, 1), embed=8),
    "empty batch": Case(batch=0, pos="ne", prefix=1),
    "empty batch of bytes": Case(batch=0, images="uint8", stats="tensor"),
    "wide rows": Case((16, 200), (16, 8), embed=40, pos="ne"),
    "ViT, bytes": Case((112, 112), embed=192, images="uint8", stats="list", pos="1ne", prefix=1),
    "ViT, bf16": Case(
        (112, 112), embed=192, dtype=torch.bfloat16, images="same", pos="1ne", prefix=1
    ),
    "ViT-H side": Case((70, 84), (14, 14), embed=160, dtype=torch.bfloat16, images="float32"),
    "13 channels": Case((32, 16), (8, 8), embed=30, channels=13, layout="channels_last"),
}
for _dtype in DTYPES:
    _name = DTYPE_NAMES[_dtype]
    NAMED[f"video {_name}"] = Case(
        (5, 18, 17), (2, 8, 8), embed=48, dtype=_dtype, images="same", pos="ne", prefix=2
    )
NAMED["video, bytes, channels last"] = Case(
    (4, 16, 16), (2, 8, 8), images="uint8", layout="channels_last", stats="list"
)

SWEPT = _cases()

REPRESENTATIVE = [
    Case((50, 47), (16, 16), embed=96, dtype=dtype, pos="1ne", prefix=1, **extra)
    for dtype in DTYPES
    for extra in (
        {"images": "uint8", "stats": "list"},
        {"images": "same", "layout": "channels_last"},
        {"images": "float32", "layout": "sliced", "stats": "floats"},
    )
] + [Case((43, 30), (14, 14), embed=33, dtype=dtype, images="same") for dtype in DTYPES]
