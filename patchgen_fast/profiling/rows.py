"""Rows of a profile, from what was timed and what was counted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from ..modules.state import state_of
from .errors import LayerError
from .kernels import Kernel
from .measure import Watched
from .result import Row, Spread
from .timeline import BACKWARD, FORWARD, OUTSIDE, Place, shown
from .work import TRAINING, Account

KERNEL_ROWS = 30  # of a compiled model: the slowest; the rest is one row
BETWEEN = "(between kernels)"


def layer_rows(
    layers: dict[str, nn.Module],
    ours: Watched,
    eager: Watched | None,
    accounts: dict[Place, Account],
    errors: dict[str, LayerError],
    reasons: dict[str, str],
    training: bool,
) -> list[Row]:
    """A row a layer that ran, its ops below it; last what lies outside the model."""
    places = list(dict.fromkeys(place for part in ours.parts for place, _ in part))
    factor = TRAINING if training else 1
    rows = []
    for name in [*layers, OUTSIDE.layer]:
        own = [place for place in places if place.layer == name]
        if not own:
            continue
        module = layers.get(name)
        entries = {place: accounts.get(place, Account()) for place in own}
        backends = sorted(set().union(*(entry.backends for entry in entries.values())))
        state = state_of(module) if module is not None else None
        fell_back = [f"fell back: {code}" for code in state.fell_back] if state else []
        theirs = _seconds(eager, partial(_in_layer, name)) if eager else None
        error = errors.get(name)
        rows.append(
            Row(
                name=shown(name),
                cls=type(module).__name__ if module is not None else "",
                calls=ours.calls.get(Place(name), 0),
                shape=next((e.shape for e in _own_first(name, entries) if e.shape), ""),
                backend=", ".join(backends) or ("torch" if module is not None else ""),
                flops=factor * sum(entry.flops for entry in entries.values()),
                bytes=sum(entry.bytes for entry in entries.values()),
                eager_seconds=theirs.median if theirs and module is not None else None,
                error=error.ours if error else None,
                eager_error=error.eager if error else None,
                reason=", ".join(fell_back) or reasons.get(name, ""),
                **_times(ours, partial(_in_layer, name)),
            )
        )
        rows += [
            Row(
                name=shown(name),
                op=place.op,
                calls=ours.calls[place],
                shape=entry.shape,
                backend=", ".join(sorted(entry.backends)),
                flops=factor * entry.flops,
                bytes=entry.bytes,
                **_times(ours, place.__eq__),
            )
            for place, entry in entries.items()
            if place.op
        ]
    return rows


def _in_layer(name: str, place: Place) -> bool:
    return place.layer == name


def _own_first(name: str, entries: dict[Place, Account]) -> list[Account]:
    """A layer's account, then those of its ops: a fast layer inside another is not seen called."""
    return sorted(entries.values(), key=lambda entry: entry is not entries.get(Place(name)))


def _times(watched: Watched, choose: Callable[[Place], bool]) -> dict:
    """The fields of a row that are times."""
    seconds = watched.seconds(lambda place, _: choose(place))
    return {
        "seconds": Spread.of(seconds),
        "forward": _seconds(watched, choose, FORWARD).median,
        "backward": _seconds(watched, choose, BACKWARD).median,
        "share": Spread.of(a / b for a, b in zip(seconds, watched.steps, strict=True)).median,
    }


def _seconds(watched: Watched, choose: Callable[[Place], bool], way: str | None = None) -> Spread:
    return Spread.of(watched.seconds(lambda place, other: choose(place) and way in (None, other)))


def coverage_of(watched: Watched) -> float:
    """The observed time over that of the step unobserved, the median of paired ratios."""
    whole = watched.seconds(lambda place, way: True)
    return Spread.of(a / b for a, b in zip(whole, watched.steps, strict=True)).median


def kernel_rows(found: list[Kernel], step: Spread) -> tuple[list[Row], float]:
    """A row a kernel, the slowest first, and one for what lies between; and what all add up to.

    A kernel's time is from runs under the profiler, the rest is what they leave of a step without.
    """
    rows = [
        Row(
            name=kernel.name,
            calls=kernel.calls,
            shape=kernel.shape,
            seconds=Spread.of(kernel.seconds),
            share=Spread.of(kernel.seconds).median / step.median,
            flops=kernel.flops,
        )
        for kernel in found
    ]
    kernels_share = sum(row.share for row in rows)
    if len(rows) > KERNEL_ROWS:
        rest = rows[KERNEL_ROWS:]
        rows = rows[:KERNEL_ROWS] + [
            Row(
                name=f"({len(rest)} other kernels)",
                calls=sum(row.calls for row in rest),
                seconds=Spread(*(sum(row.seconds.median for row in rest),) * 3),
                share=sum(row.share for row in rest),
                flops=sum(row.flops for row in rest),
            )
        ]
    left = max(1.0 - kernels_share, 0.0)
    rows.append(Row(name=BETWEEN, seconds=Spread(*(left * step.median,) * 3), share=left))
    return rows, kernels_share + left
