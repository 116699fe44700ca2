"""What a profile found, as plain objects: rows by layer, totals, and the lines drawn from them."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from ..swapping.report import ranges

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Spread:
    """Seconds: median and quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        values = sorted(samples)
        if len(values) < 2:
            return cls(*(values or [0.0]) * 3)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)


@dataclass(frozen=True)
class Row:
    """One layer, one op in it, or (of a compiled model) one kernel; all its calls of a step.

    Args:
        name: qualified name of the layer, or of layers that differ in their numbers alone.
        op: "" for the layer itself, else the op in it; its time is part of the layer's.
        cls: class of the layer.
        calls: in one step.
        shape: of the first input.
        backend: by which its ops run; "torch" for stock operators.
        seconds: of one step, forward and backward.
        forward, backward: medians in seconds.
        share: of the step timed without the profiler; layers' shares add up to about 1.
        flops: of one step.
        bytes: of inputs, outputs and weights, each call once, of the forward.
        peak_memory: bytes allocated at most beyond what was there, in the forward; None: not known.
        eager_seconds: the same layer's in the eager model; None where there is none to compare.
        error, eager_error: largest deviation from float64 as a share of the largest value.
        reason: why it is not fast, or what fell back.
    """

    name: str
    op: str = ""
    cls: str = ""
    calls: int = 0
    shape: str = ""
    backend: str = ""
    seconds: Spread = Spread(0.0, 0.0, 0.0)
    forward: float = 0.0
    backward: float = 0.0
    share: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    peak_memory: int | None = None
    eager_seconds: float | None = None
    error: float | None = None
    eager_error: float | None = None
    reason: str = ""

    @property
    def flop_rate(self) -> float | None:
        """FLOP/s; None without products."""
        return self.flops / self.seconds.median if self.flops and self.seconds.median else None

    @property
    def byte_rate(self) -> float | None:
        """B/s of the forward; None where no bytes are known."""
        return self.bytes / self.forward if self.bytes and self.forward else None

    @property
    def speedup(self) -> float | None:
        """How many times faster than in the eager model."""
        if self.eager_seconds is None or not self.seconds.median:
            return None
        return self.eager_seconds / self.seconds.median


@dataclass(frozen=True)
class Profile:
    """A profile; `print(profile)`, `profile.rows`, `profile.to_json()`.

    Args:
        model: class of the model.
        device, dtype, threads, batch, training, compiled: what was run.
        rows: layers in the model's order, each followed by its ops; kernels where compiled.
        step: seconds of a step without any observer.
        eager_step: the same of the eager model; None where it is the model that was profiled.
        coverage: the rows' time over that of a step without observer, the median of paired ratios.
        disturbed: other work took the processor in too many rounds to leave these out; with one
            thread, the times are then those that it worked.
        flops: of a step, by our ops' formulas and torch's.
        eager_flops: the same, counted from the eager model on the meta device; None: could not be.
        flops_note: why not.
        peak_flops: FLOP/s of this device in this dtype, measured now; None: not measured.
        peak_note: by what, or why not.
        tokens: B · N of the first layer's input that has three dimensions; 0 without one.
        peak_memory: bytes that a step allocates at most beyond what was there.
        trace: where the Kineto trace lies.
    """

    model: str
    device: str
    dtype: str
    threads: int
    batch: int
    training: bool
    compiled: bool
    rows: tuple[Row, ...]
    step: Spread
    eager_step: Spread | None
    coverage: float
    disturbed: bool
    flops: float
    eager_flops: float | None
    flops_note: str
    peak_flops: float | None
    peak_note: str
    tokens: int
    peak_memory: int | None
    trace: str | None = None

    @property
    def layers(self) -> tuple[Row, ...]:
        """The rows that add up to the step: those of ops left out, which are parts of them."""
        return tuple(row for row in self.rows if not row.op)

    @property
    def speedup(self) -> float | None:
        """Of the whole step over eager's."""
        return self.eager_step.median / self.step.median if self.eager_step else None

    @property
    def images_per_second(self) -> float:
        return self.batch / self.step.median

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.step.median if self.tokens else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: the step's FLOP/s over the measured peak."""
        return self.flops / self.step.median / self.peak_flops if self.peak_flops else None

    @property
    def flops_agree(self) -> bool | None:
        """Whether both counts are equal; None where the eager model could not be counted."""
        return None if self.eager_flops is None else self.flops == self.eager_flops

    def amdahl(self) -> str:
        """What making some layers fast can do for the whole, and what it did."""
        fast = [row for row in self.layers if row.eager_seconds and row.error is not None]
        if not fast or self.eager_step is None or self.speedup is None:
            return ""
        was = sum(row.eager_seconds or 0.0 for row in fast)
        now = sum(row.seconds.median for row in fast)
        share = min(was / self.eager_step.median, 1.0)
        bound = f"{1 / (1 - share):.2f}" if share < 0.995 else "any"
        return (
            f"Amdahl: the fast layers were {share:.0%} of the eager step and became "
            f"{was / now:.2f} times as fast, which makes the step "
            f"{1 / (1 - share + share * now / was):.2f} times as fast (measured: "
            f"{self.speedup:.2f}); without them at all it would be {bound} times."
        )

    def collapsed(self) -> tuple[Row, ...]:
        """Rows that differ in the numbers of their names alone as one, their times added."""
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            pattern = re.sub(r"\d+", "*", row.name)
            key = (pattern, row.op, row.cls, row.shape, row.backend, row.reason)
            groups.setdefault(key, []).append(row)
        # An op stays below its layer: groups come in the order of their first row.
        return tuple(_joined(rows) for rows in groups.values())

    def to_json(self, indent: int | None = 1) -> str:
        """The profile as JSON; seconds, bytes, FLOP, each for one step."""
        document = {"kind": "patchgen_fast.profile", "schema_version": SCHEMA_VERSION}
        totals = {
            "images_per_second": self.images_per_second,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "speedup": self.speedup,
            "amdahl": self.amdahl(),
        }
        return json.dumps({**document, **asdict(self), **totals}, indent=indent)

    def __str__(self) -> str:
        from .table import as_text

        return as_text(self)


def _joined(rows: list[Row]) -> Row:
    """One row for several layers of a kind."""
    if len(rows) == 1:
        return rows[0]

    def most(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return max(known, default=None)

    spreads = [row.seconds for row in rows]
    eager = [row.eager_seconds for row in rows if row.eager_seconds is not None]
    memory = most(row.peak_memory for row in rows)
    return replace(
        rows[0],
        name=_common_name([row.name for row in rows]),
        calls=sum(row.calls for row in rows),
        seconds=Spread(
            median=sum(x.median for x in spreads),
            q1=sum(x.q1 for x in spreads),
            q3=sum(x.q3 for x in spreads),
        ),
        forward=sum(row.forward for row in rows),
        backward=sum(row.backward for row in rows),
        share=sum(row.share for row in rows),
        flops=sum(row.flops for row in rows),
        bytes=sum(row.bytes for row in rows),
        peak_memory=None if memory is None else int(memory),
        eager_seconds=sum(eager) if eager else None,
        error=most(row.error for row in rows),
        eager_error=most(row.eager_error for row in rows),
    )


def _common_name(names: list[str]) -> str:
    """`blocks.0-11.attn` for names that differ in their numbers."""
    parts = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    out = []
    for part in parts:
        seen = set(part)
        out.append(part[0] if len(seen) == 1 else ranges(frozenset(int(p) for p in seen)))
    return "".join(out)
