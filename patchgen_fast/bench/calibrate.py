"""The machine's peaks, measured in the run that uses them, and the sentinel of the timing core.

Arithmetic and bandwidth come from loops in the native module. Without it, large products by torch
stand in; they reach less than the peak, so percentages come out too high, and `source` says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from patchgen_fast.bench.schema import Calibration
from patchgen_fast.calibration import Peak, buffer_bytes, calibrate

TRIES = 3  # on a machine whose other work leaves no sample undisturbed


def calibrate_cpu(threads: int, *, samples: int = 25) -> Calibration:
    """Arithmetic and bandwidth with this many threads; the better of read and copy a level."""
    from patchgen_fast import _native

    peaks: dict[str, Peak] = {}
    try:
        for _ in range(TRIES):
            for peak in calibrate((threads,), samples=samples):
                if peak.name not in peaks or peak.best > peaks[peak.name].best:
                    peaks[peak.name] = peak
            if not any(peak.disturbed for peak in peaks.values()):
                break
    except (RuntimeError, ValueError) as reason:
        return _by_torch(threads, samples * 0.01, str(reason))
    module = _native.info_module()
    assert module is not None
    bandwidth: dict[str, float] = {}
    for name, peak in peaks.items():
        level, _, traffic = name.partition(" ")
        if traffic:
            bandwidth[level] = max(bandwidth.get(level, 0.0), peak.best)
    disturbed = any(peak.disturbed for peak in peaks.values())
    source = f"native loops, {module.chosen_isa()}"
    if disturbed:
        source += ", on a busy machine: lower bounds"
    return Calibration(
        device="cpu",
        threads=threads,
        source=source,
        disturbed=disturbed,
        clock=peaks["clock"].best,
        fp32_flops=peaks["fp32"].best,
        bf16_flops=peaks["bf16"].best,
        bandwidth=bandwidth,
        cache_bytes={
            f"L{cache['level']}": cache["bytes"]
            for cache in module.caches()
            if f"L{cache['level']}" in bandwidth
        },
    )


def _by_torch(threads: int, seconds: float, reason: str) -> Calibration:
    """What stands in where the native module is missing."""
    return Calibration(
        device="cpu",
        threads=threads,
        source=f"torch.mm and copy_, below the true peak: {reason}",
        disturbed=True,
        fp32_flops=_matmul_rate(torch.float32, seconds),
        bf16_flops=_matmul_rate(torch.bfloat16, seconds),
        bandwidth={"DRAM": _copy_rate(seconds)},
    )


def _matmul_rate(dtype: torch.dtype, seconds: float, n: int = 768) -> float:
    a = torch.randn(n, n).to(dtype)
    b = torch.randn(n, n).to(dtype)
    return 2.0 * n**3 / _best(lambda: torch.mm(a, b), seconds)


def _copy_rate(seconds: float) -> float:
    size = buffer_bytes([], threads=1)["DRAM"]
    source = torch.randn(size // 4)
    target = torch.empty_like(source)
    return 2.0 * size / _best(lambda: target.copy_(source), seconds)


def _best(call: Callable[[], object], seconds: float) -> float:
    """Fastest of the calls that fit into `seconds`; at least three."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return min(times)


IDLE_S = 0.008  # until the threads of OpenMP's pool, which spin after their work, sleep


def make_handover() -> Callable[[], float] | None:
    """Seconds that a cache line takes from core to core now; None where nothing measures it."""
    from patchgen_fast import _native

    module = _native.info_module()
    if module is None or module.measure_handover(1) == 0.0:
        return None

    def handover() -> float:
        time.sleep(IDLE_S)
        return float(module.measure_handover())

    return handover


def make_sentinel(microseconds: float = 80.0) -> Callable[[], object]:
    """A loop of constant work on registers alone, for the timing core to sense disturbances.

    It is interpreter work: it slows down with the clock and with a neighbour on the same core,
    and neither fills caches nor heats vector units, so it does not disturb what it watches over.
    """

    def spin(count: int) -> int:
        total = 0
        for i in range(count):
            total += i & 7
        return total

    def seconds(count: int) -> float:
        start = time.perf_counter()
        spin(count)
        return time.perf_counter() - start

    count = 1000
    per_unit = statistics.median(seconds(count) for _ in range(15)) / count
    count = max(100, round(microseconds * 1e-6 / per_unit))
    return lambda: spin(count)
