"""`verify`: is a swapped model as right as the eager one? Both are held against float64.

Fast and eager results differ in low precision by about as much as each differs from the truth, so
comparing them with each other would either hide errors or raise false alarms. The rule: finite;
maximum error at most 2 x eager's + 2 eps max|truth|; mean error at most 2 x eager's +
eps mean|truth|; eps that of the result's dtype.

One tensor's error in one run is a single throw of the dice, above all for gradients of a few
numbers behind many layers, where all of them err together. So the model runs several times on
slightly different inputs, and the yardstick of a tensor is the largest error, relative to its size,
of eager's tensors of that name in all repeated layers and runs. The largest of few throws is still
a matter of luck: of a small ViT on a hundred random images, three runs failed four though our
errors are no larger than eager's on average. So a failure counts once other runs confirm it, twice
and then six times as many: a real excess shows in those too. The runs that raised the suspicion do
not judge it again, or the one unlucky throw that raised it would decide every time.

Some gradients are 0 in exact arithmetic, as that of a bias that shifts all scores of a row alike.
Ours and eager's are then rounding and nothing else, of sums whose terms cancel, and no multiple of
one bounds the other. Such a gradient is right if it can't be told from 0 beside the model's others:
if it is at most eps times the largest of them, or at most twice eager's.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..modules.state import state_of
from .apply import swap, unswap

SCHEMA_VERSION = 1
CONFIRMATIONS = (1, 2, 6)
"""How many times the asked number of runs each round takes; a failure goes on to the next."""
BEYOND_DOUBT = 2.0
"""An error that is so many times what is allowed, or not finite, needs no confirmation."""


@dataclass(frozen=True)
class Parity:
    """One tensor's errors against float64, ours and eager's, and whether ours are small enough.

    Errors are absolute; `scale` is max|truth|. Places where the truth is not finite (rows that
    attend to nothing) are left out and counted in `ignored`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float
    max_error: float
    max_error_eager: float
    max_allowed: float
    mean_error: float
    mean_error_eager: float
    mean_allowed: float
    ignored: int
    finite: bool
    exact_zero: bool = False
    """The truth is 0 but for the rounding of float64."""

    @property
    def ok(self) -> bool:
        """Whether the rule holds."""
        return (
            self.finite
            and self.max_error <= self.max_allowed
            and self.mean_error <= self.mean_allowed
        )


def parity(name: str, got: Tensor, eager: Tensor, truth: Tensor) -> Parity:
    """Hold `got` and `eager`, of one dtype, against `truth` in float64."""
    return _judge(name, _errors(name, got, eager, truth))


class _Errors(NamedTuple):
    """What one comparison found, all in float64 and absolute."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    max_error: float
    mean_error: float
    max_eager: float
    mean_eager: float
    max_truth: float
    mean_truth: float
    ignored: int
    finite: bool


def _errors(name: str, got: Tensor, eager: Tensor, truth: Tensor) -> _Errors:
    if got.shape != truth.shape or eager.shape != truth.shape:
        raise ValueError(
            f"{name}: expected results of one shape, got {tuple(got.shape)} (ours), "
            f"{tuple(eager.shape)} (eager), {tuple(truth.shape)} (float64)"
        )
    if got.dtype != eager.dtype:
        raise TypeError(
            f"{name}: expected results of one dtype, got {got.dtype} (ours), {eager.dtype} (eager)"
        )
    shape, dtype, known = tuple(got.shape), got.dtype, truth.isfinite()
    ignored = known.numel() - int(known.sum())
    got, eager, truth = (x.double()[known] for x in (got, eager, truth))
    if truth.numel() == 0:
        return _Errors(shape, dtype, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, ignored, True)
    ours, theirs, size = (got - truth).abs(), (eager - truth).abs(), truth.abs()
    return _Errors(
        shape,
        dtype,
        max_error=ours.max().item(),
        mean_error=ours.mean().item(),
        max_eager=theirs.max().item(),
        mean_eager=theirs.mean().item(),
        max_truth=size.max().item(),
        mean_truth=size.mean().item(),
        ignored=ignored,
        finite=bool(got.isfinite().all()),
    )


class _Yardstick(NamedTuple):
    """The largest errors of eager's tensors of one name: relative to the truth, and absolute."""

    max_relative: float = 0.0
    mean_relative: float = 0.0
    max_absolute: float = 0.0
    mean_absolute: float = 0.0

    def joined(self, found: _Errors) -> _Yardstick:
        return _Yardstick(
            max(self.max_relative, found.max_eager / (found.max_truth or 1.0)),
            max(self.mean_relative, found.mean_eager / (found.mean_truth or 1.0)),
            max(self.max_absolute, found.max_eager),
            max(self.mean_absolute, found.mean_eager),
        )


def _judge(
    name: str, found: _Errors, yardstick: _Yardstick | None = None, largest: float = 0.0
) -> Parity:
    """The rule, with the tensor's own eager error for a yardstick, or a larger one.

    `largest` is max|truth| over all gradients, beside which one that is exactly 0 is judged.
    """
    eps = torch.finfo(found.dtype).eps
    max_eager, mean_eager = found.max_eager, found.mean_eager
    exact_zero = yardstick is not None and found.max_truth < eps * max_eager
    if yardstick is not None and exact_zero:  # no relative error describes it
        max_eager, mean_eager = yardstick.max_absolute, yardstick.mean_absolute
    elif yardstick is not None:
        max_eager = max(max_eager, yardstick.max_relative * found.max_truth)
        mean_eager = max(mean_eager, yardstick.mean_relative * found.mean_truth)
    floor = eps * largest if exact_zero else 0.0
    return Parity(
        name=name,
        shape=found.shape,
        dtype=str(found.dtype).removeprefix("torch."),
        scale=found.max_truth,
        max_error=found.max_error,
        max_error_eager=max_eager,
        max_allowed=max(2 * max_eager + 2 * eps * found.max_truth, floor),
        mean_error=found.mean_error,
        mean_error_eager=mean_eager,
        mean_allowed=max(2 * mean_eager + eps * found.mean_truth, floor),
        ignored=found.ignored,
        finite=found.finite,
        exact_zero=exact_zero,
    )


def _judge_all(runs: list[dict[str, _Errors]], largest: float = 0.0) -> tuple[Parity, ...]:
    """The worst of all runs for each tensor, by the yardstick of its name in all layers."""
    yardsticks: dict[str, _Yardstick] = {}
    for run in runs:
        for name, found in run.items():
            role = _role(name)
            yardsticks[role] = yardsticks.get(role, _Yardstick()).joined(found)
    return tuple(
        max(
            (_judge(name, run[name], yardsticks[_role(name)], largest) for run in runs),
            key=_share_of_allowed,
        )
        for name in runs[0]
    )


def _role(name: str) -> str:
    """A tensor's name without the numbers of repeated layers."""
    return re.sub(r"\d+", "*", name)


def _share_of_allowed(p: Parity) -> float:
    """How much of what is allowed the errors use: above 1 breaks the rule."""
    if not p.finite:
        return float("inf")
    shares = ((p.max_error, p.max_allowed), (p.mean_error, p.mean_allowed))
    return max(error / allowed if allowed else float(error > 0) * 2 for error, allowed in shares)


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; printable. `ok` is True only if layers were swapped and all agree."""

    model_class: str
    swapped_layers: int
    outputs: tuple[Parity, ...]
    gradients: tuple[Parity, ...]
    runs: int = 0
    """How many runs the verdict took. Errors are those of the last round, which decided it."""

    @property
    def verdict(self) -> str:
        """ "pass", "fail", or "nothing swapped"."""
        if self.swapped_layers == 0:
            return "nothing swapped"
        return "pass" if all(p.ok for p in (*self.outputs, *self.gradients)) else "fail"

    @property
    def ok(self) -> bool:
        """Whether the verdict is "pass"."""
        return self.verdict == "pass"

    def failures(self) -> list[Parity]:
        """The tensors that break the rule."""
        return [p for p in (*self.outputs, *self.gradients) if not p.ok]

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON."""
        return json.dumps(
            {
                "schema_version": SCHEMA_VERSION,
                "kind": "verify_report",
                "model": self.model_class,
                "swapped_layers": self.swapped_layers,
                "verdict": self.verdict,
                "runs": self.runs,
                "outputs": [{**asdict(p), "ok": p.ok} for p in self.outputs],
                "gradients": [{**asdict(p), "ok": p.ok} for p in self.gradients],
            },
            indent=indent,
        )

    def __str__(self) -> str:
        head = f"patchgen_fast: verify {self.model_class}: {self.verdict}"
        if self.swapped_layers == 0:
            return (
                f"{head}: no layer of a known class in it, or all were refused; see swap's report"
            )
        lines = [
            f"{head} ({self.swapped_layers} fast layers, {len(self.outputs)} outputs, "
            f"{len(self.gradients)} gradients against float64 in {self.runs} runs)",
            f"  {'error / max|truth|':40} {'ours':>10} {'eager':>10} {'allowed':>10}",
        ]
        shown = [*self.outputs, *_worst(self.gradients)]
        lines += [_line(p) for p in shown]
        lines += [_line(p) for p in self.failures() if p not in shown]
        return "\n".join(lines)


def _worst(gradients: tuple[Parity, ...], count: int = 3) -> list[Parity]:
    """The gradients nearest to, or furthest beyond, what is allowed."""
    return sorted(gradients, key=_share_of_allowed, reverse=True)[:count]


def _line(p: Parity) -> str:
    scale = 1.0 if p.exact_zero else p.scale or 1.0
    numbers = " ".join(
        f"{x / scale:10.2e}" for x in (p.max_error, p.max_error_eager, p.max_allowed)
    )
    note = "" if p.ok else "  not finite" if not p.finite else "  TOO FAR"
    if p.exact_zero:
        note += "  (0 in exact arithmetic: absolute errors)"
    if p.ignored:
        note += f"  ({p.ignored} undefined places left out)"
    return f"  {p.name[:40]:40} {numbers}{note}"


def verify(
    model: nn.Module,
    *inputs: Any,
    kwargs: dict[str, Any] | None = None,
    gradients: bool = True,
    backend: str | None = None,
    runs: int = 3,
    seed: int = 0,
) -> VerifyReport:
    """Hold a model's fast and eager results against float64, outputs and gradients.

    Works on copies, in evaluation mode (dropout off), with the dtype and device of the model. A
    model that is not swapped yet is swapped in a copy. Outputs come from a run without gradients,
    as in inference; gradients from one with them, of a random combination of all outputs. All runs
    but the first scale every number of the floating inputs by something between 0.99 and 1.

    Args:
        model: swapped or not.
        inputs: its positional arguments; tensors in containers too.
        kwargs: its keyword arguments.
        gradients: compare the gradients of parameters and floating inputs too.
        backend: for swapping an unswapped model.
        runs: how often to run, on slightly different inputs; where that fails, the rounds of
            `CONFIRMATIONS` follow before the verdict is a failure.
        seed: of the random numbers.

    Returns:
        A `VerifyReport`: `print(report)`, `report.ok`, `report.failures()`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module to verify, got {type(model).__name__}")
    fast = copy.deepcopy(model).eval()
    if not any(state_of(m) for m in fast.modules()):
        swap(fast, backend=backend)
    layers = sum(state_of(m) is not None for m in fast.modules())
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if layers == 0:
        return VerifyReport(name, 0, (), ())
    eager = copy.deepcopy(fast)
    unswap(eager)
    truth = copy.deepcopy(eager).double()
    done = 0
    for times in CONFIRMATIONS:
        outputs: list[dict[str, _Errors]] = []
        grads: list[dict[str, _Errors]] = []
        for run in range(done, done + runs * times):
            arguments = _run_arguments((inputs, kwargs or {}), seed + run, jitter=run > 0)
            ours, theirs, exact = (
                _run(candidate, pytree.tree_map(convert, arguments), gradients, seed + run)
                for candidate, convert in ((fast, _same), (eager, _same), (truth, _to_double))
            )
            outputs.append(_compare(ours[0], theirs[0], exact[0]))
            grads.append(_compare(ours[1], theirs[1], exact[1]))
        done += len(outputs)
        largest = max((found.max_truth for run in grads for found in run.values()), default=0.0)
        report = VerifyReport(name, layers, _judge_all(outputs), _judge_all(grads, largest), done)
        if report.ok or max(map(_share_of_allowed, report.failures())) > BEYOND_DOUBT:
            break
    return report


def _run_arguments(arguments: Any, seed: int, jitter: bool) -> Any:
    """The arguments of one run: shrunk a little, so that finfo.min in a mask stays finite."""
    generator = torch.Generator().manual_seed(seed)

    def shrink(x: Any) -> Any:
        if not jitter or not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        factor = 1.0 - 0.01 * torch.rand(x.shape, generator=generator, dtype=torch.float64)
        return (x.detach().double() * factor.to(x.device)).to(x.dtype)

    return pytree.tree_map(shrink, arguments)


def _same(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _to_double(x: Any) -> Any:
    x = _same(x)
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


Tensors = dict[str, Tensor]


def _run(model: nn.Module, arguments: Any, gradients: bool, seed: int) -> tuple[Tensors, Tensors]:
    """Floating outputs of a run without gradients, and the gradients of another, by name."""
    inputs, kwargs = arguments
    with torch.no_grad():
        outputs = _floating(model(*inputs, **kwargs), "output")
    if not gradients:
        return outputs, {}
    leaves = _floating(inputs, "input") | _floating(kwargs, "input")
    for leaf in leaves.values():
        leaf.requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        produced = _floating(model(*inputs, **kwargs), "output")
        terms = [
            (out * _weights_like(out, generator)).sum()
            for out in produced.values()
            if out.requires_grad
        ]
        if not terms:
            return outputs, {}
        torch.stack([term.to(torch.float64) for term in terms]).sum().backward()
    found = {f"grad {name}": leaf.grad for name, leaf in leaves.items()}
    found |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return outputs, {name: grad for name, grad in found.items() if grad is not None}


def _weights_like(out: Tensor, generator: torch.Generator) -> Tensor:
    """The same numbers for every dtype: what bfloat16 can hold."""
    numbers = torch.randn(out.shape, generator=generator).to(torch.bfloat16)
    return numbers.to(device=out.device, dtype=out.dtype)


def _floating(tree: Any, prefix: str) -> Tensors:
    try:
        leaves, _ = pytree.tree_flatten_with_path(tree)
        named = [(pytree.keystr(path), leaf) for path, leaf in leaves]
    except ValueError:  # a class that some library registered without names for its parts
        named = [(f"[{i}]", leaf) for i, leaf in enumerate(pytree.tree_leaves(tree))]
    return {
        f"{prefix}{name}": leaf
        for name, leaf in named
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def _compare(ours: Tensors, eager: Tensors, truth: Tensors) -> dict[str, _Errors]:
    if ours.keys() != eager.keys():
        missing = sorted(ours.keys() ^ eager.keys())
        raise ValueError(f"expected the same tensors from both models, got differences: {missing}")
    return {name: _errors(name, ours[name], eager[name], truth[name]) for name in ours}
