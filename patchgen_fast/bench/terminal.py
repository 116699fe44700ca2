"""Tables for a terminal, by rich; NO_COLOR is obeyed."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from patchgen_fast.bench import compare, tables
from patchgen_fast.bench.schema import RED, ResultFile

COLOURS = {"slower": "red", "lost": "red", "parity": "red", "faster": "green"}
NUMBERS = {
    "eager ms",
    "ours ms",
    "× eager",
    "× SDPA",
    "× best",
    "of peak",
    "× before",
    "× now",
    "change",
    "p",
    "ms before",
    "ms now",
}


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(
            heading, justify="right" if heading in NUMBERS else "left", overflow="fold"
        )
    return table


def show(result: ResultFile) -> None:
    """The result's tables, a table a level."""
    console = Console()
    for line in tables.machine_lines(result):
        console.print(Text(line, style="dim"))
    for level in tables.LEVELS:
        cases = [case for case in result.cases if case.level == level]
        if not cases:
            continue
        table = _table(level, tables.HEADINGS)
        for case in cases:
            style = "red" if case.status == RED else ""
            table.add_row(*[Text(value, style=style) for value in tables.row(case)])
        console.print(table)
    for line in tables.missing_peers(result):
        console.print(Text(line, style="dim"))


def show_comparison(comparison: compare.Comparison) -> None:
    """Changes first."""
    console = Console()
    table = _table("", compare.HEADINGS)
    for row in compare.rows(comparison):
        table.add_row(*[Text(value, style=COLOURS.get(row[1], "")) for value in row])
    for line in comparison.warnings:
        console.print(Text(f"warning: {line}", style="yellow"))
    console.print(table)
    console.print(compare.summary(comparison))
