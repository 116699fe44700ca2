"""Kernel configurations as data: tables read from the top, the first row that matches wins.

A row names the chips, the kind of arithmetic and the largest sizes it is meant for, and says why.
No row has been timed on a GPU yet: "static" reasons come from compiled code (registers, spills,
shared memory, instruction counts; see benchmarks/results/gpu-code-report.md), "expected" ones from
the chip's documented rates. `patchgen-fast tune` times candidates on the user's GPU, and what it
writes is preferred over a row here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import triton

from .. import __version__

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

    def choose(self, chip: int, kind: str, d: int, n: int, masked: bool = False) -> Config:
        """The tuned configuration of these sizes if there is one, else the first row that holds."""
        if _asked is not None:
            _asked.append((self, Question(chip, kind, d, n, masked)))
        key = chip, kind, d, n, masked
        if key not in self._answers:
            question = Question(*key)
            answer = self.shipped(question)
            tuned = _tuned().get(self.key(question))
            if tuned is not None and answer is not None:
                answer = type(answer)(**tuned)
            self._answers[key] = answer
        return self._answers[key]

    def shipped(self, question: Question) -> Config:
        """The first row that holds, whatever has been tuned."""
        return next(row.config for row in self.rows if row.holds(*question))

    def key(self, question: Question) -> str:
        """How a tuned file names a question; the chip is in the file's environment."""
        _, kind, d, n, masked = question
        return f"{self.name}/{kind}/{d}/{n}" + "/masked" * masked


_asked: list[tuple[Table[Any], Question]] | None = None


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
    rows, answers = table.rows, table._answers
    table.rows, table._answers = (Row(config, "chosen by hand"),), {}
    try:
        yield
    finally:
        table.rows, table._answers = rows, answers


def tuned_path() -> Path:
    """Where `patchgen-fast tune` writes; PATCHGEN_FAST_TUNED names another file."""
    named = os.environ.get("PATCHGEN_FAST_TUNED")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "patchgen_fast" / "tuned.json"


def environment() -> dict[str, str]:
    """What a tuned file must have been made with to be believed."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "patchgen_fast": __version__,
    }


def read_tuned() -> dict[str, Any]:
    """The tuned file, or an empty document where there is none or it was made elsewhere."""
    try:
        document = json.loads(tuned_path().read_text())
        if document["environment"] == environment():
            return {"configs": {}, "gains": {}, **document}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"environment": environment(), "configs": {}, "gains": {}}


@cache
def _tuned() -> dict[str, dict[str, Any]]:
    return dict(read_tuned()["configs"])
