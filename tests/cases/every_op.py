"""One call of each op, for what all ops have in common: tracing, counting, threads, determinism."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from oracle import Evaluation, Problem, Target, evaluate, normalised_arguments
from torch import Tensor

from cases import (
    add_layer_norm,
    attention,
    layer_norm,
    linear,
    patch_embed,
    patch_unembed,
    qk_norm_rope,
    varlen_attention,
)
from patchgen_fast.registry import OPS, Op


@dataclass(frozen=True)
class Sample:
    """A case of an op; ``sized(n)`` gives the fields that change it to about n tokens."""

    name: str
    module: ModuleType
    case: Any
    sized: Any

    def __str__(self) -> str:
        return self.name

    @property
    def op(self) -> Op:
        return OPS[self.name]

    def of(self, **changes: Any) -> Sample:
        """The same call with other fields."""
        return replace(self, case=replace(self.case, **changes))

    def of_size(self, n: int) -> Sample:
        return self.of(**self.sized(n))

    def problem(self, device: str = "cpu") -> Problem:
        return self.module.problem(self.case, device)

    def call(self, backend: str | None, **inputs: Any) -> dict[str, Tensor]:
        return self.module.call(self.case, backend, **inputs)

    def check(self, target: Target) -> None:
        self.module.check(self.case, target)

    def run(self, backend: str | None, device: str = "cpu") -> Evaluation:
        """Results and gradients, unchecked."""
        stated = self.problem(device)
        function = functools.partial(self.call, backend)
        return evaluate(function, stated.inputs, stated.differentiable, stated.cotangents)

    def compare(self, got: Evaluation, target: Target) -> None:
        """Results and gradients by the parity rule."""
        stated = self.problem(target.device)
        if self.name == "attention":
            self.module.compare(self.case, stated, got, target.factor)
        else:
            left_out = ["weight", "bias"] if self.name.endswith("layer_norm") else []
            stated.compare(got, target.factor, left_out if target.backend == "torch" else [])

    def arguments(self, device: str = "cpu") -> list[Any]:
        """What the kernel's schema is called with; leaves where gradients are wanted."""
        stated = self.problem(device)
        leaves = leaves_of(stated)
        args = normalised_arguments(self.name, lambda: self.call("reference", **leaves))
        names = [argument.name for argument in self.op.overloads["cpu"]._schema.arguments]
        return [
            x.detach().requires_grad_(name in stated.differentiable) if isinstance(x, Tensor) else x
            for name, x in zip(names, args, strict=False)
        ]


def leaves_of(stated: Problem) -> dict[str, Any]:
    return {
        name: x.detach().requires_grad_(name in stated.differentiable)
        if isinstance(x, Tensor)
        else x
        for name, x in stated.inputs.items()
    }


SAMPLES = [
    Sample(
        "attention",
        attention,
        attention.Case(
            nq=65,
            nk=77,
            dim=40,
            heads=(4, 2),
            mask="float32:plain:b1qk",
            causal="bottom_right",
            lengths=True,
        ),
        lambda n: {"nq": n, "nk": n + 12},
    ),
    Sample(
        "varlen_attention",
        varlen_attention,
        varlen_attention.Case((33, 0, 20), (40, 5, 20), heads=(4, 2), is_causal=True, spare=2),
        lambda n: {"lengths": (n, 0, 20), "lengths_k": (n + 7, 5, 20)},
    ),
    Sample(
        "qk_norm_rope",
        qk_norm_rope,
        qk_norm_rope.Case(dim=32, heads=(4, 2), prefix=1),
        lambda n: {"tokens": n},
    ),
    Sample(
        "patch_embed",
        patch_embed,
        patch_embed.Case((34, 48), embed=48, pos="1ne", prefix=1, stats="list"),
        lambda n: {"size": (4 * n + 2, 5 * n), "patch": (4, 4), "pos": "none"},
    ),
    Sample(
        "patch_unembed",
        patch_unembed,
        patch_unembed.Case(),
        lambda n: {"grid": (n, n + 3)},
    ),
    Sample(
        "linear",
        linear,
        linear.Case(activation="gelu", residual="broadcast"),
        lambda n: {"rows": (2, n)},
    ),
    Sample(
        "layer_norm",
        layer_norm,
        layer_norm.Case(),
        lambda n: {"rows": (2, n)},
    ),
    Sample(
        "add_layer_norm",
        add_layer_norm,
        add_layer_norm.Case(),
        lambda n: {"rows": (2, n)},
    ),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
