"""Contenders of a case, and the three phases in which any of them can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from patchgen_fast.bench.cases import Case
from patchgen_fast.bench.schema import Cost, Parity

DTYPE = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
Outputs = torch.Tensor | tuple[torch.Tensor, ...]


class Absent(Exception):
    """The peer is not installed here; the message is the reason."""


class Refused(Exception):
    """The peer is here and does not take this case; the message is the reason."""


@dataclass
class Runnable:
    """A contender ready to run: a forward, and the tensors whose gradients it owes, by name."""

    forward: Callable[[], Outputs]
    leaves: dict[str, torch.Tensor] = field(default_factory=dict)

    def outputs(self) -> tuple[torch.Tensor, ...]:
        out = self.forward()
        return out if isinstance(out, tuple) else (out,)


COMPILES = "compiles for too long for --quick"
AGAIN = "runs a whole model once more: too long for --quick"


@dataclass(frozen=True)
class Contender:
    """Name, role ("eager", "peer" or "ours"), and how to make it (or raise Absent, Refused)."""

    name: str
    role: str
    make: Callable[[], Runnable]
    forward_only: bool = False
    not_quick: str = ""  # why it is left out of the quick suite
    own_memory: bool = False  # allocates outside torch, so that its memory can't be seen
    devices: Sequence[str] = ("cpu", "cuda")


@dataclass
class Problem:
    """A case with everything needed to check and to time it."""

    contenders: list[Contender]  # eager first
    truth: Callable[[], Runnable]  # float64
    cost: Cost
    items: int = 0  # images a call, where images a second make sense
    # Instead of one comparison a tensor: whole models have gradients of a single number behind many
    # layers, whose error in one run is a throw of the dice. None: the rule tensor by tensor.
    # Otherwise: rows of ours, and of eager.
    verify: Callable[[], tuple[list[Parity], list[Parity]]] | None = None
    note: str = ""


def generator(case: Case) -> torch.Generator:
    """The case's own random numbers, drawn on the CPU so that every device sees the same."""
    return torch.Generator().manual_seed(case.seed)


def normal(case: Case, random: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Normal values, already rounded to the case's dtype, on its device."""
    values = torch.randn(*shape, generator=random) * scale
    return values.to(DTYPE[case.dtype]).to(case.device)


def leaf(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy that gradients are taken of (floats) in this dtype; uint8 stays as it is."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()


def on_leaves(
    function: Callable[..., Outputs],
    tensors: Mapping[str, torch.Tensor | None],
    dtype: torch.dtype | None = None,
) -> Runnable:
    """`function(**tensors)` on leaves of its own; tensors given as None stay None."""
    own = {name: None if value is None else leaf(value, dtype) for name, value in tensors.items()}
    leaves = {name: t for name, t in own.items() if t is not None and t.requires_grad}
    return Runnable(lambda: function(**own), leaves)


def gradients_of(outputs: Sequence[torch.Tensor], case: Case) -> list[torch.Tensor]:
    """Random gradients for the outputs, in the case's dtype."""
    random = torch.Generator().manual_seed(case.seed + 1)
    return [normal(case, random, *out.shape) for out in outputs]


def evaluate(
    runnable: Runnable, phase: str, grads: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Outputs and, unless the phase is forward, gradients, by name."""
    if phase == "forward":
        with torch.inference_mode():
            outputs = runnable.outputs()
        return _named(outputs)
    outputs = runnable.outputs()
    found = {} if phase == "backward" else _named(tuple(out.detach() for out in outputs))
    grads = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)]
    results = torch.autograd.grad(outputs, list(runnable.leaves.values()), grads, allow_unused=True)
    for (name, tensor), grad in zip(runnable.leaves.items(), results, strict=True):
        found[f"grad {name}"] = torch.zeros_like(tensor) if grad is None else grad
    return found


def _named(outputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    if len(outputs) == 1:
        return {"output": outputs[0]}
    return {f"output {index}": out for index, out in enumerate(outputs)}


def timed_call(
    runnable: Runnable, phase: str, grads: Sequence[torch.Tensor]
) -> Callable[[], object]:
    """The call that is timed. Backward alone keeps its graph, which forward has built before."""
    leaves = list(runnable.leaves.values())
    if phase == "forward":

        def forward() -> object:
            with torch.inference_mode():
                return runnable.forward()

        return forward
    if phase == "backward":
        outputs = runnable.outputs()
        return lambda: torch.autograd.grad(
            outputs, leaves, grads, retain_graph=True, allow_unused=True
        )
    return lambda: torch.autograd.grad(runnable.outputs(), leaves, grads, allow_unused=True)


def compiled(
    function: Callable[..., Outputs], tensors: Mapping[str, torch.Tensor | None]
) -> Runnable:
    """`function` under torch.compile with its defaults; Refused with the compiler's own words."""
    torch._dynamo.reset()
    runnable = on_leaves(torch.compile(function, fullgraph=True, dynamic=False), tensors)
    try:
        with torch.inference_mode():
            runnable.forward()
    except Exception as error:  # whatever the compiler raises is the reason shown
        raise Refused(f"torch.compile: {first_line(error)}") from error
    return runnable


def compiled_module(
    module: torch.nn.Module, run: Callable[[torch.nn.Module], Runnable]
) -> Runnable:
    """`run` on the module under torch.compile with its defaults."""
    torch._dynamo.reset()
    runnable = run(torch.compile(module, dynamic=False))  # type: ignore[arg-type]
    runnable.leaves = {name.removeprefix("_orig_mod."): t for name, t in runnable.leaves.items()}
    try:
        with torch.inference_mode():
            runnable.forward()
    except Exception as error:  # whatever the compiler raises is the reason shown
        raise Refused(f"torch.compile: {first_line(error)}") from error
    return runnable


def first_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an error's text, short enough for a table."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    line = text[0] or type(error).__name__
    return line if len(line) <= limit else line[: limit - 1] + "…"
