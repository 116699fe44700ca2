"""This machine's peaks, measured by the native module's loops: arithmetic and bandwidth.

A benchmark's percentages are of these, not of a data sheet's figures: they hold for this machine,
its clock now, and the instruction set in use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from patchgen_fast import _native

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Peak:
    """One measured peak.

    Args:
        name: "clock", "fp32", "bf16", or e.g. "L2 read", "DRAM copy".
        threads: that worked at the same time; the figures are their sum.
        unit: "Hz", "flop/s" or "B/s" (copy: bytes read plus bytes written).
        best: of the samples; what the machine can do.
        median: of the samples.
        disturbed: no sample kept its cores throughout, so that `best` is a lower bound.
    """

    name: str
    threads: int
    unit: str
    best: float
    median: float
    disturbed: bool


def available_cpus() -> int:
    """Logical CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def buffer_bytes(caches: list[dict[str, Any]], threads: int) -> dict[str, int]:
    """Bytes a thread works on so that its data lies in L2, in L3, or in no cache.

    Half of a thread's share of a level, if that is clearly more than the level before holds; four
    times the largest cache, shared among the threads, for DRAM.
    """
    sizes: dict[str, int] = {}
    previous = 0
    for cache in caches:
        share = cache["bytes"] // min(threads, cache["shared_by"] or 1)
        if cache["level"] >= 2 and share // 2 > 2 * previous:
            sizes[f"L{cache['level']}"] = share // 2
        previous = cache["bytes"]
    largest = max((cache["bytes"] for cache in caches), default=32 * MEBIBYTE)
    whole = min(max(4 * largest, 256 * MEBIBYTE), 2048 * MEBIBYTE)
    sizes["DRAM"] = max(whole // threads, 16 * MEBIBYTE)
    return sizes


def measurements(
    module: Any, threads: int, samples: int
) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """(name, unit, call) of every peak with this many threads."""
    for dtype in ("fp32", "bf16"):
        yield dtype, "flop/s", partial(module.measure_arithmetic, dtype, threads, samples)
    for level, size in buffer_bytes(module.caches(), threads).items():
        for traffic in ("read", "copy"):
            call = partial(module.measure_bandwidth, traffic, size, threads, samples)
            yield f"{level} {traffic}", "B/s", call


def calibrate(
    threads: tuple[int, ...] | None = None,
    *,
    samples: int = 25,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Peak]:
    """Measure the clock, and arithmetic and bandwidth with 1 thread and with all (or as `threads`).

    Takes 2 to 10 seconds; longer on a busy machine, whose disturbed samples are taken again.
    `progress(done, of, name)` is called before each measurement. Raises RuntimeError if the native
    module was not built, with the reason and the remedy, and ValueError for a wrong
    PATCHGEN_FAST_CPU_ISA.
    """
    module = _native.info_module()
    if module is None:
        failure = _native.build_failure("info")
        raise RuntimeError(f"no calibration: {failure.reason}. Remedy: {failure.remedy}")
    counts = threads or tuple(sorted({1, available_cpus()}))
    planned: list[tuple[int, str, str, Callable[[], dict[str, Any]]]] = [
        (1, "clock", "Hz", partial(module.measure_clock, samples))
    ]
    for count in counts:
        planned += [(count, *row) for row in measurements(module, count, samples)]
    peaks = []
    for done, (count, name, unit, call) in enumerate(planned):
        if progress is not None:
            progress(done, len(planned), f"{name}, {count} thread{'s' * (count > 1)}")
        found = call()
        peaks.append(Peak(name, count, unit, found["best"], found["median"], found["disturbed"]))
    return peaks


def as_table(peaks: list[Peak]) -> list[tuple[str, str]]:
    """(what, figure) lines: Gflop/s with flops a cycle, GB/s."""
    clock = next((peak.best for peak in peaks if peak.name == "clock"), 0.0)
    rows = []
    for peak in peaks:
        label = f"{peak.name}, {peak.threads} thread{'s' * (peak.threads > 1)}"
        if peak.unit == "Hz":
            label, text = "clock", f"{peak.best / 1e9:.2f} GHz"
        elif peak.unit == "flop/s":
            text = f"{peak.best / 1e9:.0f} Gflop/s"
            if clock:
                text += f" ({peak.best / clock / peak.threads:.1f} flop a cycle and core)"
        else:
            text = f"{peak.best / 1e9:.1f} GB/s"
        rows.append((label, text + (" (busy machine: a lower bound)" if peak.disturbed else "")))
    return rows


def as_dicts(peaks: list[Peak]) -> list[dict[str, Any]]:
    return [asdict(peak) for peak in peaks]
