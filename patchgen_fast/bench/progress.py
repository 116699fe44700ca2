"""Progress on stderr: a live bar on a terminal, a line a case elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from patchgen_fast.bench.cases import Case
from patchgen_fast.bench.runner import Progress


def _name(case: Case) -> str:
    threads = "" if case.threads == "one" else ", all threads"
    return f"{case.op} {case.name} {case.dtype} {case.phase}{threads}"


@contextmanager
def shown(total: int, *, quiet: bool = False) -> Iterator[Progress]:
    """A function for `runner.Options.progress`."""
    if quiet:
        yield lambda event, case, text: None
    elif sys.stderr.isatty():
        with _bar(total) as report:
            yield report
    else:
        yield _lines(total)


def _lines(total: int) -> Progress:
    finished = 0
    started = time.monotonic()

    def report(event: str, case: Case, text: str) -> None:
        nonlocal finished
        if event == "end":
            finished += 1
            spent = time.monotonic() - started
            print(
                f"[{finished}/{total}] {_name(case)}: {text} ({spent:.0f} s)",
                file=sys.stderr,
                flush=True,
            )

    return report


@contextmanager
def _bar(total: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    # Two redraws a second: each takes well under a millisecond, and a round that it disturbs is
    # one that the timing core discards.
    with Bar(*columns, console=Console(stderr=True), refresh_per_second=2) as bar:
        task = bar.add_task("", total=total)

        def report(event: str, case: Case, text: str) -> None:
            if event == "end":
                bar.advance(task)
            else:
                detail = f" [dim]{text}[/dim]" if text else ""
                bar.update(task, description=f"{_name(case)}{detail}")

        yield report
