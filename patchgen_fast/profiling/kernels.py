"""Rows of a compiled model: layers are gone from it, so its operators and kernels are what can be
told apart.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from .trace import profiling

# Ranges around the work, not work: their own time is what lies between the kernels.
RANGES = ("Torch-Compiled Region", "## Call CompiledFxGraph", "TorchDynamo", "CompiledFunction",
          "autograd::engine", "ProfilerStep", "PythonSubclass", "Pregraph bytecode")  # fmt: skip


@dataclass
class Kernel:
    """All calls of a step by one name and one set of shapes."""

    name: str
    shape: str
    calls: int = 0
    flops: float = 0.0
    seconds: list[float] = field(default_factory=list)  # a step, round by round


def kernels(step: Callable[[], Any], cuda: bool, rounds: int) -> list[Kernel]:
    """Every kernel of a step with its own time, the slowest first."""
    found: dict[tuple[str, str], Kernel] = {}
    for number in range(rounds):
        seconds: dict[tuple[str, str], float] = defaultdict(float)
        with profiling(cuda, record_shapes=True) as profiler:
            step()
        for event in profiler.events() or ():
            on_gpu = "cuda" in str(event.device_type).lower()
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            if on_gpu != cuda or not own or event.name.startswith(RANGES):
                continue
            shapes = [shape for shape in event.input_shapes or () if shape]
            key = (event.name, ", ".join("×".join(map(str, shape)) for shape in shapes[:2]))
            kernel = found.setdefault(key, Kernel(*key))
            seconds[key] += own * 1e-6
            if number == 0:
                kernel.calls += 1
                kernel.flops += flops_of(event.name, event.input_shapes or ())
        for key, kernel in found.items():
            kernel.seconds.append(seconds[key])
    # By medians, which are what is shown: the profiler's first round is slow at odd places.
    return sorted(found.values(), key=lambda kernel: -statistics.median(kernel.seconds))


def flops_of(name: str, shapes: Any) -> float:
    """FLOPs of an operator of torch or of ours by its name and the shapes it was given; else 0."""
    namespace, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace, None), operator, None) if operator else None
    formula = flop_registry.get(packet)
    if formula is None:
        return 0.0
    try:
        return float(formula(*shapes))
    except (TypeError, ValueError, IndexError, AssertionError):
        return 0.0  # a formula that needs more than shapes
