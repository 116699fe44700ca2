"""A Kineto trace of one step, with the layers' names in it; and from it, peak memory by layer.

The file opens in Perfetto, in chrome://tracing and in HTA. For HTA it names a rank, and one
profiler step, since of two it would throw the last away. HTA rounds times to microseconds, which
breaks its call trees where operators are shorter: set HTA_DISABLE_NS_ROUNDING=1. Most of its
analyses are of GPU kernels, of which a trace of the CPU has none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ..memory import results_by_torch
from .timeline import BACKWARD, FORWARD, Place, Timeline, shown

MEMORY_EVENT = "[memory]"
STEP = "ProfilerStep#0"  # as torch's own profiler calls it when it follows a schedule


@contextmanager
def profiling(cuda: bool, **options: Any) -> Iterator[profile]:
    """torch's profiler, without the lines that Kineto writes to stderr at its start and its end.

    Kineto reads its log level from the environment when it is first used; a level that the user
    has set stays.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        with profile(activities=activities, **options) as profiler:
            yield profiler
            if cuda:
                torch.cuda.synchronize()
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes of torch's CPU allocator that a call holds at most beyond what was there before."""
    with results_by_torch(), profiling(False, profile_memory=True) as profiler:
        call()
    return _peaks(profiler, {}, "cpu")[1]


class NamedRanges(Timeline):
    """Shows where the forward is as named ranges, one after the other, in the profiler's view.

    The backward needs none: the profiler links its operators to those of the forward, and a range
    that begins in one node of autograd and ends in another would overlap with both.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        super().__init__(model, layers, lambda: 0)
        self.places: dict[str, Place] = {}
        self._open: Any = None

    def _mark(self, place: Place, direction: str = FORWARD) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
        if direction == BACKWARD or place.layer not in self.layers:
            return
        label = shown(place.layer) + (f": {place.op}" if place.op else "")
        self.places[label] = place
        self._open = record_function(label)
        self._open.__enter__()


def trace(
    model: nn.Module,
    layers: dict[str, nn.Module],
    step: Callable[[], Any],
    path: Path | None,
    *,
    named: bool = True,
) -> tuple[dict[str, int], int]:
    """Run one step under the profiler, and write the trace if `path` (`*.json.gz`) is given.

    Returns the bytes that each layer's own stretches of the forward allocate at most beyond what
    was there, and those of the whole step. `named=False` puts no ranges in: for compiled models.
    """
    cuda = next((p.is_cuda for p in model.parameters()), False)
    ranges = NamedRanges(model, layers)
    with results_by_torch(), profiling(cuda, record_shapes=True, profile_memory=True) as profiler:
        with record_function(STEP), ranges.watching() if named else nullcontext():
            step()
        profiler.add_metadata_json("distributedInfo", '{"rank": 0, "world_size": 1}')
    if path is not None:
        _export(profiler, path)
    return _peaks(profiler, ranges.places, "cuda" if cuda else "cpu")


def _export(profiler: profile, path: Path) -> None:
    """Whole or not at all, under the name given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{path.name}")  # the suffix says that it is packed
    try:
        profiler.export_chrome_trace(str(partial))
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _peaks(profiler: profile, places: dict[str, Place], device: str) -> tuple[dict[str, int], int]:
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    happened: list[tuple[int, int, str, int]] = []  # time, order at that time, layer, bytes
    for event in events:
        name = event.name()
        if name == MEMORY_EVENT:
            if device in str(event.device_type()).lower():
                happened.append((event.start_ns(), 1, "", event.nbytes()))  # type: ignore[union-attr]
        elif name in places and "cpu" in str(event.device_type()).lower():
            happened.append((event.start_ns(), 0, places[name].layer, 0))
    happened.sort()
    peaks: dict[str, int] = {}
    held = highest = base = 0
    layer: str | None = None
    for _, _, entered, size in happened:
        if size == 0 and entered != layer:
            layer, base = entered, held
        held += size
        highest = max(highest, held)
        if layer is not None:
            peaks[layer] = max(peaks.get(layer, 0), held - base)
    return {shown(layer): peak for layer, peak in peaks.items()}, highest
