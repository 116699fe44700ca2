"""The command `report`. Only click is imported at the top: help is instant."""

from __future__ import annotations

from pathlib import Path

import click

from patchgen_fast.bench.console import USAGE, read, require_packages, say, stop, wanted_exports


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The page [default: beside the newest result].",
)
@click.option(
    "--export",
    "exports",
    multiple=True,
    metavar="FORMAT=PATH",
    help="The newest result as pytest-benchmark, github-action, junit, csv, summary or markdown.",
)
def report(results: tuple[Path, ...], html: Path | None, exports: tuple[str, ...]) -> None:
    """Make one self-contained HTML page of results of `bench`.

    Shows the newest of RESULTS; the others are its history. Exit codes: 0 fine, 2 a file that
    cannot be read or written.
    """
    require_packages()
    from patchgen_fast.bench import exports as formats
    from patchgen_fast.bench import report as page
    from patchgen_fast.bench.results import ResultError, write_atomically

    wanted = wanted_exports(exports)
    try:
        documents = sorted(((read(path), path) for path in results), key=lambda d: d[0].started)
        newest, source = documents[-1]
        target = html or source.with_suffix(".html")
        write_atomically(target, page.render([document for document, _ in documents]).encode())
        for name, path in wanted:
            formats.save(newest, name, path)
    except ResultError as error:
        stop(USAGE, str(error))
    say("Written: " + ", ".join(str(path) for path in (target, *(path for _, path in wanted))))
