"""One model of the sweep: what `swap` replaces in it, and whether the result is right."""

from __future__ import annotations

import copy
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from patchgen_fast import dispatch
from patchgen_fast.modules import fused
from patchgen_fast.swapping import swap, verification, verify

ATTENTIONS = (
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    F.softmax,
    torch.softmax,
    torch.Tensor.softmax,
)
CONVOLUTIONS = (F.conv2d, F.conv3d)
SAMPLE = 10  # one model of so many is run in bfloat16 and with gradients too
MOST_PARAMETERS = 200_000_000  # of a model that is run; larger ones are not, and said to be
MANY_PARAMETERS = 8_000_000  # from here on, one image and one run of `verify`

# The models run are small and stand for large ones: their norms are to run as those of these do.
fused.FEWEST_NORMALISED = 0

Small = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model to run, and its arguments by position and by name."""


class NotSmall(Exception):
    """No small enough model of a kind can be built, or it does not run; says why."""


class Counting(TorchFunctionMode):
    """Counts what torch is asked for: attentions, and convolutions that cut an image in patches."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = 0
        self.patch_convolutions = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in ATTENTIONS:
            self.attentions += 1
        elif func in CONVOLUTIONS and _cuts_patches(*args, **kwargs):
            self.patch_convolutions += 1
        return func(*args, **kwargs)


def _cuts_patches(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> bool:
    kernel = tuple(weight.shape[2:])
    strides = (stride,) * len(kernel) if isinstance(stride, int) else tuple(stride)
    unpadded = padding in (0, "valid") or not any(padding)
    return weight.shape[1] <= 4 and strides == kernel and max(kernel) > 1 and unpadded


@dataclass
class Entry:
    """What was found for one model."""

    name: str
    status: str
    """ "fully", "partly", "refused", "not run", "no attention" or "error"."""
    swapped: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    """Layers that stayed as they were, by class: the reason."""
    eager: tuple[int, int] | None = None
    """Attentions and patch convolutions that the eager model runs."""
    remaining: tuple[int, int] | None = None
    """Those that the swapped model still leaves to torch."""
    fell_back: dict[str, int] = field(default_factory=dict)
    """Calls of swapped layers that took the eager way, by reason."""
    parity: str = ""
    sampled: str = ""
    """Verdict with gradients, and in bfloat16, of the models of the sample."""
    note: str = ""
    seconds: float = 0.0


def examine(
    name: str,
    build: Callable[[], nn.Module],
    small: Callable[[nn.Module], Small],
    sample: int = SAMPLE,
) -> Entry:
    """One model, from the meta device to the verdict."""
    begin = time.monotonic()
    with torch.device("meta"):
        whole = build()
    report = swap(whole, dry_run=True)
    if not any(row.kind == "attention" for row in report.rows):
        return Entry(name, "no attention")
    kinds = Counter(row.kind for row in report.with_action("would swap") if row.kind != "layer")
    left = {
        row.cls: row.reason
        for row in report.with_action("refused", "unsupported")
        if row.kind in ("attention", "patch_embed")
    }
    entry = Entry(name, "refused", dict(kinds), left)
    if kinds["attention"] or kinds["patch_embed"]:
        torch.manual_seed(0)
        try:
            _run(entry, *small(whole), in_sample=zlib.crc32(name.encode()) % sample == 0)
        except NotSmall as reason:
            entry.status, entry.note = "not run", str(reason)
    entry.seconds = round(time.monotonic() - begin, 2)
    return entry


def first_that_runs(candidates: Iterable[Callable[[], Small]]) -> Small:
    """The first model that can be built, is small enough, and runs.

    Raises:
        NotSmall: none of them is; with the reason of the last.
    """
    reason, fewest = "nothing to build", None
    for build in candidates:
        try:
            with torch.device("meta"):
                parameters = sum(p.numel() for p in build()[0].parameters())
            if parameters > MOST_PARAMETERS:
                fewest = min(parameters, fewest or parameters)
                continue
            model, inputs, named = build()
            with torch.no_grad():
                model.eval()(*inputs, **named)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            continue
        return model, inputs, named
    if fewest is not None:
        reason = f"the smallest has {fewest / 1e6:.0f} million parameters"
    raise NotSmall(reason)


def _run(
    entry: Entry,
    model: nn.Module,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
    in_sample: bool,
) -> None:
    model = _lively(model.eval())
    with torch.no_grad():
        with Counting() as eager:
            model(*inputs, **named)
        swap_report = swap(model)
        with Counting() as fast, dispatch.counting() as ran:
            model(*inputs, **named)
    if not swap_report.with_action("swapped"):
        raise NotSmall("built small, it has nothing to swap")
    entry.eager = (eager.attentions, eager.patch_convolutions)
    entry.remaining = (fast.attentions, fast.patch_convolutions)
    fell_back: Counter[str] = Counter()
    for counts in swap_report.counters().values():
        fell_back.update(counts["fell_back"])
    entry.fell_back = dict(fell_back)
    swap_report.undo()
    if any(call.startswith(("attention.", "varlen_attention.", "patch_embed.")) for call in ran):
        entry.status = "partly" if any(entry.remaining) else "fully"
    runs = 1 if sum(p.numel() for p in model.parameters()) > MANY_PARAMETERS else 3
    notes: list[str] = []
    entry.parity = _verdict(model, inputs, named, notes, gradients=False, runs=runs)
    if in_sample:
        with_gradients = _verdict(model, inputs, named, notes, gradients=True, runs=3)
        inputs, named = pytree.tree_map(_halved, (inputs, named))
        half = _verdict(model.bfloat16(), inputs, named, notes, gradients=False, runs=runs)
        entry.sampled = f"{with_gradients}, {half}"
    entry.note = "\n".join(notes)


def _verdict(
    model: nn.Module,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
    notes: list[str],
    gradients: bool,
    runs: int,
) -> str:
    """verify's verdict; "undecided" where it fails, and eager by another kernel of torch's too.

    That is so where a model chooses by its numbers, as the best of its proposals: rounding alone
    makes it choose otherwise, in eager as in ours, and what follows is another result.
    """
    report = verify(model, *inputs, kwargs=named, gradients=gradients, runs=runs)
    if report.ok:
        return report.verdict
    notes.append(str(report))
    wrong = {p.name for p in report.failures()}
    control = eager_by_another_kernel(model, inputs, named, gradients, report.runs)
    return "undecided" if wrong <= control else report.verdict


def eager_by_another_kernel(
    model: nn.Module,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
    gradients: bool,
    runs: int = 1,
) -> set[str]:
    """The tensors by which the eager model itself breaks the rule, its attention computed by
    `scaled_dot_product_attention`'s plain formula instead of torch's fused kernel.

    In the same runs as `verify` had, by its rule: a pool takes another maximum in one of many.
    """
    exactly = copy.deepcopy(model).double()
    outputs, grads = [], []
    for run in range(runs):
        arguments = verification._run_arguments((inputs, named), run, jitter=run > 0)
        with sdpa_kernel(SDPBackend.MATH):
            other = verification._run(model, _copied(arguments), gradients, seed=run)
        eager = verification._run(model, _copied(arguments), gradients, seed=run)
        exact = verification._run(
            exactly,
            pytree.tree_map(verification._to_double, arguments),
            gradients,
            seed=run,
        )
        outputs.append(verification._compare(other[0], eager[0], exact[0]))
        grads.append(verification._compare(other[1], eager[1], exact[1]))
    largest = max((found.max_truth for run in grads for found in run.values()), default=0.0)
    judged = (*verification._judge_all(outputs), *verification._judge_all(grads, largest))
    return {p.name for p in judged if not p.ok}


def _copied(arguments: Any) -> Any:
    return pytree.tree_map(verification._same, arguments)


def _halved(x: Any) -> Any:
    return x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@torch.no_grad()
def _lively(model: nn.Module) -> nn.Module:
    """Zeros and tiny scales, as new models have them, would hide mistakes."""
    for parameter in model.parameters():
        if parameter.numel() and (parameter.dim() < 2 or parameter.std() < 1e-3):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
