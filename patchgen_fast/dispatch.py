"""Which backend runs an op: the fastest that accepts, or the one that was named, or an error that
says why not.

Every backend of an op declares its refusals. ``backend=None`` walks the op's order of preference
and takes the first backend that refuses nothing; a named backend runs or raises with its reasons,
never silently another. Calls are counted where the work is done, so that a test or a report can
tell what ran.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _native

if TYPE_CHECKING:
    from .registry import Op

BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")


def _orders(*names: str) -> dict[str | None, tuple[str, ...]]:
    """Those names in turn, and the same with any one backend before the others."""
    orders: dict[str | None, tuple[str, ...]] = {None: names}
    for first in BACKENDS:
        orders[first] = (first, *[name for name in names if name != first])
    return orders


# By device, then by what an op's own table puts first. On a GPU Triton serves until a CUDA C++
# kernel has been measured faster for a shape.
_ORDERS = {
    "cpu": _orders("cpu", "torch", "reference"),
    "cuda": _orders("triton", "cuda", "torch", "reference"),
}
_ORDERS_ELSEWHERE = _orders("torch", "reference")


class Refusal(NamedTuple):
    """One thing that a backend can't do: a code for reports, a sentence, and the test on the op's
    arguments.
    """

    code: str
    reason: str
    when: Callable[[Any], bool]


class BackendRefused(ValueError):
    """The backend that was asked for by name can't run this call: ``refusal`` is the first reason
    (None where no backend at all accepts).
    """

    # In args rather than set by an __init__ of its own, which torch.compile can't trace.

    @property
    def backend(self) -> str | None:
        return self.args[1] if len(self.args) > 1 else None

    @property
    def refusal(self) -> Refusal | None:
        return self.args[2] if len(self.args) > 2 else None

    def __str__(self) -> str:
        return str(self.args[0])


def order(op: Op, args: Any) -> tuple[str, ...]:
    """Backends by preference for these arguments: by device, then by the op's own thresholds."""
    orders = _ORDERS.get(args[0].device.type, _ORDERS_ELSEWHERE)
    return orders[op.prefer(args) if op.prefer is not None else None]


def choose(op: Op, args: Any, backend: str | None = None) -> str:
    """The backend that runs ``op`` on ``args``; BackendRefused where the named one can't."""
    if backend is None:
        for name in order(op, args):
            if op.backends[name].refusal(args) is None:
                return name
        raise BackendRefused(f"{op.name}: no backend accepts this call.\n{explain(op, args)}")
    if backend not in BACKENDS:
        raise ValueError(
            f"{op.name}: expected backend to be None or one of {', '.join(BACKENDS)}; "
            f"got {backend!r}"
        )
    refusal = op.backends[backend].refusal(args)
    if refusal is not None:
        raise BackendRefused(
            f"{op.name}: backend {backend!r} can't run this call: {refusal.reason}. "
            f"Pass backend=None for the fastest that can.\n{explain(op, args)}",
            backend,
            refusal,
        )
    return backend


def refusals(op: Op, args: Any) -> dict[str, list[Refusal]]:
    """All that each backend refuses of this call, by backend; an empty list means that it would
    run.
    """
    return {name: op.backends[name].refusals_of(args) for name in BACKENDS}


def explain(op: Op, args: Any) -> str:
    """The call's arguments and every backend's answer to it, a line each."""
    import torch

    # A symbolic size can't be written into a text while torch.compile traces.
    named = () if torch.compiler.is_compiling() else zip(args._fields, args, strict=True)
    lines = ["arguments:"] if named else []
    for name, value in named:
        if hasattr(value, "dtype"):
            value = f"{list(value.shape)} {value.dtype} on {value.device}, strides {value.stride()}"
        lines.append(f"  {name}: {value}")
    lines.append("backends:")
    for name, found in refusals(op, args).items():
        lines.append(f"  {name}: {'; '.join(r.reason for r in found) or 'accepts'}")
    return "\n".join(lines)


_counts: Counter[str] = Counter()
_native_base: dict[str, int] = {}
_lock = threading.Lock()


def count(call: str) -> None:
    """Note one run of ``op.backend``; C++ kernels count their own."""
    with _lock:
        _counts[call] += 1


def counters() -> dict[str, int]:
    """Runs of every implementation since the last reset, as {"attention.cpu": 12, ...}.

    Kernels are counted where they run, so compiled and exported graphs count as well. ``torch``
    and ``reference`` are compositions of stock operators: they are counted when called eagerly,
    and not inside a compiled graph, of which they have become a part.
    """
    with _lock:
        total = dict(_counts)
    for call, calls in _native.call_counts().items():
        total[call] = total.get(call, 0) + calls - _native_base.get(call, 0)
    return {call: calls for call, calls in sorted(total.items()) if calls}


def reset_counters() -> None:
    """Start counting from zero."""
    with _lock:
        _counts.clear()
    _native_base.update(_native.call_counts())


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Count what runs inside: the yielded dictionary is filled on leaving the block."""
    before = counters()
    ran: dict[str, int] = {}
    try:
        yield ran
    finally:
        for call, calls in counters().items():
            if calls > before.get(call, 0):
                ran[call] = calls - before.get(call, 0)
