"""Kernel configurations as data: tables read from the top, the first row that matches wins.

A row names the chips, the kind of arithmetic and the largest sizes it is meant for, and says why.
No row has been timed on a GPU yet: "static" reasons come from compiled code (registers, spills,
shared memory, instruction counts; see benchmarks/results/gpu-code-report.md), "expected" ones from
the chip's documented rates. `patchgen-fast tune` times candidates on the user's GPU, and what it
writes is preferred over a row here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from . import tuned

HALF, TF32, IEEE = "half", "tf32", "ieee"
ANY = (HALF, TF32, IEEE)
FLOAT32 = (TF32, IEEE)
HOPPER = (90,)
DATACENTER = (80, 90, 100, 103, 110)
BLACKWELL = (100, 103, 110)

Config = TypeVar("Config")


@dataclass(frozen=True)
class Row(Generic[Config]):
    """One line of a table: where it holds, what is used there, and the reason."""

    config: Config
    reason: str
    chips: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ANY
    d: int = 1 << 30
    n: int = 1 << 30
    masked: bool = True

    def holds(self, chip: int, kind: str, d: int, n: int, masked: bool) -> bool:
        return (
            (not self.chips or chip in self.chips)
            and kind in self.kinds
            and d <= self.d
            and n <= self.n
            and (self.masked or not masked)
        )


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """The arithmetic a table distinguishes: 16-bit, TF32 or IEEE float32."""
    return precision if dtype is torch.float32 else HALF


class Question(NamedTuple):
    """What a table is asked: chip (90 is sm_90), arithmetic, D, keys, whether masked."""

    chip: int
    kind: str
    d: int
    n: int
    masked: bool


class Table(Generic[Config]):
    """Rows in order, and the answers already given: a call costs one dictionary look-up."""

    def __init__(self, name: str, *rows: Row[Config]) -> None:
        self.name = name
        self.rows = rows
        self._answers: dict[tuple[int, str, int, int, bool], Config] = {}
        self._by_hand: tuple[Config, ...] = ()  # one that is every answer; see `answering`

    def choose(self, chip: int, kind: str, d: int, n: int, masked: bool = False) -> Config:
        """The tuned configuration of these sizes if there is one, else the first row that holds."""
        if _asked is not None:
            _asked.append((self, Question(chip, kind, d, n, masked)))
        if self._by_hand:
            return self._by_hand[0]
        key = chip, kind, d, n, masked
        if key not in self._answers:
            question = Question(*key)
            self._answers[key] = self.preferred(question, self.shipped(question))
        return self._answers[key]

    def preferred(self, question: Question, shipped: Config) -> Config:
        """What the tuned file has in place of the shipped answer, which else stands."""
        found = tuned.document()["configs"].get(self.key(question))
        if found is None or shipped is None:
            return shipped
        fields = {name: type(value) for name, value in asdict(shipped).items()}  # type: ignore[call-overload]
        if isinstance(found, dict) and {n: type(x) for n, x in found.items()} == fields:
            return type(shipped)(**found)
        wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
        tuned.distrust(tuned.path(), f"got {found!r} for {self.key(question)}, which has {wanted}")
        return shipped

    def shipped(self, question: Question) -> Config:
        """The first row that holds, whatever has been tuned."""
        return next(row.config for row in self.rows if row.holds(*question))

    def key(self, question: Question) -> str:
        """How a tuned file names a question; the chip is in the file's environment."""
        _, kind, d, n, masked = question
        return f"{self.name}/{kind}/{d}/{n}" + "/masked" * masked


_asked: list[tuple[Table[Any], Question]] | None = None
_changes = 0


def is_asking() -> bool:
    """Whether somebody collects questions: then every call must ask its own."""
    return _asked is not None


def changes() -> int:
    """Differs from an earlier call's answer if a table may answer differently since."""
    return _changes


@contextmanager
def asking() -> Iterator[list[tuple[Table[Any], Question]]]:
    """Collects which tables are asked what, so that a search knows what a call depends on."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


@contextmanager
def answering(table: Table[Any], config: Any) -> Iterator[None]:
    """Lets `table` answer every question with `config`, for a test or a search."""
    global _changes
    before, table._by_hand = table._by_hand, (config,)
    _changes += 1
    try:
        yield
    finally:
        table._by_hand = before
        _changes += 1


def reread(*tables: Table[Any]) -> None:
    """Lets tables answer by what is in the tuned file now."""
    global _changes
    tuned.document.cache_clear()
    for table in tables:
        table._answers.clear()
    _changes += 1
