"""The command `compare`. Only click is imported at the top: help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from patchgen_fast.bench.console import USAGE, read, require_packages, stop

if TYPE_CHECKING:
    from patchgen_fast.bench.compare import Gate


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--relative",
    default=8.0,
    show_default=True,
    metavar="PERCENT",
    help="A speed-up must fall by more than this.",
)
@click.option(
    "--absolute", default=0.05, show_default=True, metavar="RATIO", help="And by more than this."
)
@click.option(
    "--scatters",
    default=1.0,
    show_default=True,
    metavar="TIMES",
    help="And by more than this many times the scatter of single rounds.",
)
@click.option(
    "--significance",
    default=0.01,
    show_default=True,
    metavar="P",
    help="And a Mann-Whitney test must give a smaller p.",
)
@click.option(
    "--format",
    "output",
    type=click.Choice(["table", "markdown", "json"]),
    default="table",
    show_default=True,
    help="What goes to stdout; a table that goes to a file is markdown.",
)
def compare(
    old: Path,
    new: Path,
    relative: float,
    absolute: float,
    scatters: float,
    significance: float,
    output: str,
) -> None:
    """Compare two results of `bench`: has anything become slower?

    Judges the speed-up over the peers that both runs timed; absolute times only warn. Exit codes:
    0 fine, 1 a regression, 2 a file that cannot be read, 3 a red parity check in NEW.
    """
    require_packages()
    from patchgen_fast.bench import compare as comparison
    from patchgen_fast.bench.results import ResultError

    gate: Gate = comparison.Gate(
        relative=relative / 100,
        absolute=absolute,
        scatters=scatters,
        significance=significance,
    )
    try:
        found = comparison.compare(read(old), read(new), gate)
    except ResultError as error:
        stop(USAGE, str(error))
    if output == "markdown" or (output == "table" and not sys.stdout.isatty()):
        click.echo(comparison.markdown(found))
    elif output == "json":
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(found.changes), indent=1))
    else:
        from patchgen_fast.bench import terminal

        terminal.show_comparison(found)
    sys.exit(found.exit_code)
