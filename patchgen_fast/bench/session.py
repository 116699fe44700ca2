"""A run of the command `bench`: measure, write what is wanted of the result, show it, judge it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchgen_fast.bench.console import PARITY, REGRESSION, USAGE, say, stop

if TYPE_CHECKING:
    from patchgen_fast.bench.cases import Case
    from patchgen_fast.bench.schema import ResultFile


def measure(
    chosen: list[Case],
    path: Path,
    suite: str,
    quick: bool,
    resume: bool,
    quiet: bool,
    peers: tuple[str, ...],
    filters: dict[str, Any],
    earlier: ResultFile | None,
) -> ResultFile:
    """Run the cases into the file at `path`; against `earlier`, what got slower once more."""
    from patchgen_fast.bench import calibrate, environment, progress, results, runner, timing
    from patchgen_fast.bench.schema import ResultFile, Settings

    plan = timing.QUICK if quick else timing.FULL
    kept_filters = {
        name: [value] if isinstance(value, str) else list(value)
        for name, value in filters.items()
        if value
    }
    settings = Settings(suite=suite, filters=kept_filters, plan=runner.plan_record(plan))
    machine = environment.collect()
    if resume and path.exists():
        result = results.resumable(path, settings, machine.commit)
    else:
        results.refuse_foreign(path)
        started = results.now()
        result = ResultFile(
            started=started, updated=started, settings=settings, environment=machine
        )
    writer = results.ResultWriter(path, result)
    with progress.shown(len(chosen), quiet=quiet) as report:
        options = runner.Options(
            plan=plan,
            quick=quick,
            peers=peers,
            handover=calibrate.make_handover(),
            progress=report,
        )
        runner.run(chosen, writer, options)
        if earlier is not None:
            _measure_again(chosen, writer, options, earlier)
    return writer.result


def _measure_again(chosen: list[Case], writer: Any, options: Any, earlier: ResultFile) -> None:
    """What looks slower than the baseline gets one more try before it is called a regression."""
    from patchgen_fast.bench import compare as comparison
    from patchgen_fast.bench import runner

    suspects = {c.id for c in comparison.compare(earlier, writer.result).regressions}
    if not suspects:
        return
    say(f"Slower than the baseline, measured once more: {', '.join(sorted(suspects))}")
    writer.result.cases = [case for case in writer.result.cases if case.id not in suspects]
    runner.run([case for case in chosen if case.id in suspects], writer, options)


def write_reports(
    result: ResultFile,
    path: Path,
    markdown_path: Path | None,
    plot_path: Path | None,
    wanted: list[tuple[str, Path]],
) -> list[Path]:
    """Everything beside the JSON; what was written."""
    from patchgen_fast.bench import exports, plot
    from patchgen_fast.bench import report as report_page
    from patchgen_fast.bench.results import ResultError, write_atomically

    written = [path]
    try:
        for name, target in [("markdown", markdown_path or path.with_suffix(".md")), *wanted]:
            exports.save(result, name, target)
            written.append(target)
        page = path.with_suffix(".html")
        write_atomically(page, report_page.render([result]).encode())
        written.append(page)
        picture = plot_path or path.with_suffix(".png")
        if plot.save(result, picture):
            written.append(picture)
    except plot.PlotUnavailable as reason:
        say(str(reason))
    except ResultError as error:
        stop(USAGE, str(error))
    return written


def show(result: ResultFile, output: str) -> None:
    """The result on stdout, in this format."""
    from patchgen_fast.bench import results, tables

    if output == "json":
        click.echo(results.encode(result), nl=False)
    elif output == "csv":
        click.echo(tables.csv_text(result), nl=False)
    elif output == "markdown" or not sys.stdout.isatty():
        click.echo(tables.markdown(result), nl=False)
    else:
        from patchgen_fast.bench import terminal

        terminal.show(result)


def verdict(result: ResultFile, earlier: ResultFile | None) -> int:
    """The exit status, its reasons said on stderr."""
    from patchgen_fast.bench.schema import ERROR

    if result.red:
        for case in result.red:
            say(f"Parity is red: {case.id}: {case.reason}")
        return PARITY
    failed = [case for case in result.cases if case.status == ERROR]
    for case in failed:
        say(f"Failed: {case.id}: {case.reason}")
    if earlier is None:
        return REGRESSION if failed else 0
    from patchgen_fast.bench import compare as comparison

    found = comparison.compare(earlier, result)
    say(comparison.summary(found))
    return found.exit_code or (REGRESSION if failed else 0)
