"""What a run tells as it goes on: a bar on a terminal, JSON lines, TensorBoard if installed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from .files import cannot_write, replace_file

FILE = "log.jsonl"


class Logbook:
    """RUN/log.jsonl, one object a line: {"kind": "train" | "evaluation", "step": n, ...}.

    A resumed run drops the lines after the step that it resumes from, and goes on.
    """

    def __init__(self, run: Path, step: int, total: int, *, quiet: bool) -> None:
        self.path = run / FILE
        self._keep_until(step)
        try:
            run.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._board = _tensorboard(run)
        self._quiet, self._told, self._total = quiet, 0.0, total
        self._bar = _bar(step, total) if not quiet and sys.stderr.isatty() else None

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a process that was killed
        replace_file(self.path, lambda partial: _write(partial, "".join(kept)))

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line, and the numbers among its values to TensorBoard."""
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def show(self, step: int, text: str, *, now: bool = False) -> None:
        """The bar's state; without a terminal a line every ten seconds, or `now`."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        elif not self._quiet and (now or time.monotonic() > self._told + 10):
            self._told = time.monotonic()
            print(f"step {step} of {self._total}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()
        self._file.close()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _tensorboard(run: Path) -> Any:
    """A writer of RUN/tensorboard, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(run / "tensorboard")


def _bar(step: int, total: int) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        refresh_per_second=2,
    )
    bar.add_task("", total=total, completed=step)
    bar.start()
    return bar
