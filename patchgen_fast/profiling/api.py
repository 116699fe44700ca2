"""`patchgen_fast.profile`: where a step's time goes, layer by layer, and how near the limits."""

from __future__ import annotations

import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import calibration
from ..modules.state import state_of
from ..swapping import swap, unswap
from .errors import layer_errors
from .kernels import kernels
from .measure import MIN_ROUNDS, WARM_UP, Progress, make_step, measure, unobserved
from .result import Profile, Row, Spread
from .rows import coverage_of, kernel_rows, layer_rows
from .timeline import layers_of
from .trace import trace as run_trace
from .work import TRAINING, account, eager_flops


def profile(
    model: nn.Module,
    *inputs: Any,
    kwargs: dict[str, Any] | None = None,
    training: bool = False,
    compile: bool = False,
    fast: bool = True,
    backend: str | None = None,
    seconds: float = 10.0,
    calibrate: bool = True,
    trace: str | Path | None = None,
    progress: Progress = lambda text: None,
) -> Profile:
    """Profile one step of a model on its own device: time, work and error by layer.

    Works on copies. A model that is not swapped yet is swapped, and the eager one is timed in the
    same rounds; shares are of a step that nothing observes. FLOPs are those of the forward, three
    times that in training, as is the habit.

    Args:
        model: swapped or not, in training or evaluation mode as it is.
        inputs: its positional arguments, on its device and in its dtype.
        kwargs: its keyword arguments.
        training: a forward and a backward (of the mean square of the outputs; no optimiser)
            instead of a forward in inference mode.
        compile: under `torch.compile`; rows are then operators and kernels, not layers.
        fast: False profiles the model as it is, with nothing to compare.
        backend: for swapping a model that is not swapped yet.
        seconds: how long to measure; at least five rounds, whatever they take.
        calibrate: measure this device's peak as well (some seconds), for shares of it.
        trace: where to write a Kineto trace, `*.json.gz`.
        progress: told in a few words what is being done.

    Returns:
        A `Profile`: `print(profile)`, `profile.rows`, `profile.to_json()`.

    Raises:
        TypeError: model is no module. ValueError: a trace that is not called `*.json.gz`; neither
            the model nor its inputs have a tensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module to profile, got {type(model).__name__}")
    if seconds <= 0:
        raise ValueError(f"expected seconds above 0, got {seconds}")
    path = Path(trace) if trace is not None else None
    if path is not None and not path.name.endswith(".json.gz"):
        raise ValueError(f"expected a trace called *.json.gz, which viewers open, got {path}")
    args, kwargs = inputs, kwargs or {}
    subject = copy.deepcopy(model)
    reasons: dict[str, str] = {}
    if fast and not any(state_of(module) for module in subject.modules()):
        report = swap(subject, backend=backend)
        reasons = {row.name: row.reason for row in report.rows if row.reason}
    swapped = any(state_of(module) for module in subject.modules())
    eager = copy.deepcopy(subject) if fast and swapped else None
    if eager is not None:
        unswap(eager)

    tensors = itertools.chain(model.parameters(), model.buffers(), _tensors((args, kwargs)))
    first = next(tensors, None)
    if first is None:
        raise ValueError("expected a model with parameters, or tensors for inputs; got neither")
    run = make_step(subject, args, kwargs, training)
    layers = layers_of(subject)
    progress("counting")
    accounts, tokens = account(subject, layers, lambda: subject(*args, **kwargs))
    counted = sum(entry.flops for entry in accounts.values())
    expected, flops_note = _expected(subject, args, kwargs)
    disturbed = False
    if compile:
        rows, step, eager_step, coverage, run = _compiled(
            subject, eager, args, kwargs, training, first.device, seconds, progress
        )
    else:
        pairs = [(subject, run)]
        if eager is not None:
            pairs.append((eager, make_step(eager, args, kwargs, training)))
        measured = measure(pairs, layers, first.device, seconds, progress)
        ours, theirs = measured[0], measured[1] if eager is not None else None
        disturbed = not all([watched.keep_quiet() for watched in measured])
        progress("errors")
        errors = layer_errors(subject, eager, args, kwargs) if eager is not None else {}
        rows = layer_rows(layers, ours, theirs, accounts, errors, reasons, training)
        step, coverage = Spread.of(ours.steps), coverage_of(ours)
        eager_step = Spread.of(theirs.steps) if theirs else None
    progress("trace")
    peaks, peak_memory = run_trace(subject, layers, run, path, named=not compile)
    rows = [row if row.op else replace(row, peak_memory=peaks.get(row.name)) for row in rows]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), first.dtype)
    peak, peak_note = None, "not calibrated"
    if calibrate:
        peak, peak_note = _peak(first.device, dtype, progress)
    factor = TRAINING if training else 1
    return Profile(
        model=f"{type(model).__module__}.{type(model).__qualname__}",
        device=first.device.type,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        batch=_batch(args, kwargs),
        training=training,
        compiled=compile,
        rows=tuple(rows),
        step=step,
        eager_step=eager_step,
        coverage=coverage,
        disturbed=disturbed,
        flops=factor * counted,
        eager_flops=None if expected is None else float(factor * expected),
        flops_note=flops_note,
        peak_flops=peak,
        peak_note=peak_note,
        tokens=tokens,
        peak_memory=peak_memory,
        trace=None if path is None else str(path),
    )


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))


def _batch(args: Any, kwargs: Any) -> int:
    return next((x.shape[0] for x in _tensors((args, kwargs)) if x.dim()), 1)


def _expected(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int | None, str]:
    try:
        return eager_flops(model, args, kwargs), ""
    except Exception as error:  # a model may read values, which the meta device has not
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _compiled(
    subject: nn.Module,
    eager: nn.Module | None,
    args: tuple,
    kwargs: dict[str, Any],
    training: bool,
    device: torch.device,
    seconds: float,
    progress: Progress,
) -> tuple[list[Row], Spread, Spread | None, float, Callable[[], Any]]:
    """Rows by kernel of the compiled model, its steps in turn with those of the compiled eager."""
    cuda = device.type == "cuda"
    options: dict[str, Any] = {}
    if not cuda and sys.platform == "linux":
        options["cpp.enable_kernel_profile"] = True  # else fused loops have no name in a profile
    steps = []
    for model in (subject, eager):
        if model is not None:
            progress("compiling" if model is subject else "compiling eager")
            compiled = torch.compile(model, dynamic=False, options=options)
            steps.append(make_step(compiled, args, kwargs, training))  # type: ignore[arg-type]
            for _ in range(WARM_UP):
                steps[-1]()
    times: list[list[float]] = [[] for _ in steps]
    started = time.perf_counter()
    while len(times[0]) < MIN_ROUNDS or time.perf_counter() - started < seconds:
        for step, samples in zip(steps, times, strict=True):
            samples.append(unobserved(step, cuda)[0])
        progress(f"{len(times[0])} rounds")
    progress("kernels")
    rows, coverage = kernel_rows(kernels(steps[0], cuda, MIN_ROUNDS), Spread.of(times[0]))
    eager_step = Spread.of(times[1]) if eager is not None else None
    return rows, Spread.of(times[0]), eager_step, coverage, steps[0]


def _peak(device: torch.device, dtype: torch.dtype, progress: Progress) -> tuple[float | None, str]:
    """FLOP/s of the device in this dtype, and by what it was measured, or why it was not."""
    progress("calibrating")
    try:
        if device.type == "cuda":
            from ..bench import gpu_timing

            found = gpu_timing.calibrate()
            peak = found.fp32_flops if dtype == torch.float32 else found.bf16_flops
            return peak, found.source
        name = "fp32" if dtype == torch.float32 else "bf16"
        peaks = calibration.calibrate((torch.get_num_threads(),), samples=9)
    except (ImportError, RuntimeError, ValueError) as reason:
        return None, str(reason)
    best = next(peak for peak in peaks if peak.name == name)
    note = f"measured, {name}, {best.threads} thread{'s' * (best.threads != 1)}"
    return best.best, note + (", busy machine: a lower bound" if best.disturbed else "")
