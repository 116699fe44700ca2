"""The commands `bench` and `compare`. Only click is imported at the top: help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from patchgen_fast.bench.cases import Case
    from patchgen_fast.bench.compare import Gate
    from patchgen_fast.bench.schema import ResultFile

DEFAULT_FOLDER = "results"
REGRESSION, USAGE, PARITY, NO_GPU = 1, 2, 3, 4
EXTRA = "patchgen-fast[bench]"


def _say(text: str) -> None:
    click.echo(text, err=True)


def _stop(code: int, text: str) -> None:
    _say(f"Error: {text}")
    sys.exit(code)


@click.command()
@click.option(
    "--suite",
    default=None,
    metavar="NAME",
    help="standard (the default), ops, layers, models, cpu (all of these), gpu, quick.",
)
@click.option("--quick", is_flag=True, help="The quick suite, short rounds: under two minutes.")
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Only this op; repeatable.")
@click.option("--case", "names", multiple=True, metavar="NAME", help="Only this shape; repeatable.")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    metavar="NAME",
    help="float32, bfloat16 or float16; repeatable.",
)
@click.option(
    "--phase",
    "phases",
    multiple=True,
    metavar="NAME",
    help="forward, backward or both; repeatable.",
)
@click.option("--device", "devices", multiple=True, metavar="NAME", help="cpu or cuda; repeatable.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    metavar="NAME",
    help="Ours by this backend instead of the fastest; repeatable.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="NAME",
    help="Only these peers besides eager; repeatable.",
)
@click.option(
    "--threads",
    type=click.Choice(["one", "all"]),
    default=None,
    help="Only cases with one thread, or with all.",
)
@click.option("--list", "list_only", is_flag=True, help="Show the cases and measure nothing.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help=f"The result file [default: {DEFAULT_FOLDER}/bench-SUITE.json].",
)
@click.option(
    "--markdown",
    "markdown_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The table as markdown [default: beside the result].",
)
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A picture, PNG [default: beside the result].",
)
@click.option(
    "--export",
    "exports",
    multiple=True,
    metavar="FORMAT=PATH",
    help="Also as pytest-benchmark, github-action, junit, csv, summary or markdown; repeatable.",
)
@click.option("--resume", is_flag=True, help="Go on with a result file, if there is one.")
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Compare with this result; what got slower is measured once more.",
)
@click.option("--require-gpu", is_flag=True, help="Exit with 4 where there is no GPU.")
@click.option(
    "--format",
    "output",
    type=click.Choice(["table", "markdown", "csv", "json"]),
    default="table",
    show_default=True,
    help="What goes to stdout.",
)
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def bench(
    suite: str | None,
    quick: bool,
    list_only: bool,
    json_path: Path | None,
    markdown_path: Path | None,
    plot_path: Path | None,
    resume: bool,
    baseline: Path | None,
    require_gpu: bool,
    output: str,
    quiet: bool,
    peers: tuple[str, ...],
    exports: tuple[str, ...],
    **filters: Any,
) -> None:
    """Compare the fast layers with eager PyTorch and other peers: parity, then speed.

    Exit codes: 0 fine, 1 a case that failed or a regression against --baseline, 2 wrong usage,
    3 a red parity check, 4 no GPU under --require-gpu.
    """
    from patchgen_fast.bench import cases as case_list

    suite = suite or ("quick" if quick else "standard")
    try:
        chosen = case_list.select(suite, **filters)
    except case_list.UsageError as error:
        raise click.UsageError(str(error)) from error
    if list_only:
        for case in chosen:
            click.echo(f"{case.id}\t{case.shape}")
        return
    _require_packages()
    from patchgen_fast.bench.results import ResultError

    wanted = _exports(exports)
    path = json_path or Path(DEFAULT_FOLDER) / f"bench-{suite}.json"
    quick = quick or suite == "quick"
    try:
        earlier = _read(baseline) if baseline else None
        _check_gpu(chosen, require_gpu)
        result = _measure(chosen, path, suite, quick, resume, quiet, peers, filters, earlier)
    except ResultError as error:
        _stop(USAGE, str(error))
        return
    except KeyboardInterrupt:
        _stop(130, f"interrupted; {path} keeps what was measured, --resume goes on")
        return
    written = _write_reports(result, path, markdown_path, plot_path, wanted)
    _show(result, output)
    _say("Written: " + ", ".join(str(item) for item in written))
    sys.exit(_verdict(result, earlier))


def _exports(specifications: tuple[str, ...]) -> list[tuple[str, Path]]:
    from patchgen_fast.bench import exports

    try:
        return [exports.parse(specification) for specification in specifications]
    except ValueError as error:
        raise click.UsageError(f"--export: {error}") from error


def _require_packages() -> None:
    try:
        import msgspec  # noqa: F401
    except ImportError:
        raise click.UsageError(f"bench needs msgspec and rich: pip install '{EXTRA}'") from None


def _read(path: Path) -> ResultFile:
    from patchgen_fast.bench import results

    return results.read(path)


def _check_gpu(chosen: list[Case], require_gpu: bool) -> None:
    if not any(case.device == "cuda" for case in chosen):
        if require_gpu:
            raise click.UsageError(
                "--require-gpu with a suite that has no GPU case; use --suite gpu"
            )
        return
    import torch

    if not torch.cuda.is_available():
        if require_gpu:
            _stop(NO_GPU, "no GPU here, and --require-gpu was given")
        _say("No GPU here: GPU cases are shown as skipped.")


def _measure(
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
    from patchgen_fast.bench import environment, progress, results, runner, timing
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
        options = runner.Options(plan=plan, quick=quick, peers=peers, progress=report)
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
    _say(f"Slower than the baseline, measured once more: {', '.join(sorted(suspects))}")
    writer.result.cases = [case for case in writer.result.cases if case.id not in suspects]
    runner.run([case for case in chosen if case.id in suspects], writer, options)


def _write_reports(
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
        _say(str(reason))
    except ResultError as error:
        _stop(USAGE, str(error))
    return written


def _show(result: ResultFile, output: str) -> None:
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


def _verdict(result: ResultFile, earlier: ResultFile | None) -> int:
    from patchgen_fast.bench.schema import ERROR

    if result.red:
        for case in result.red:
            _say(f"Parity is red: {case.id}: {case.reason}")
        return PARITY
    failed = [case for case in result.cases if case.status == ERROR]
    for case in failed:
        _say(f"Failed: {case.id}: {case.reason}")
    if earlier is None:
        return REGRESSION if failed else 0
    from patchgen_fast.bench import compare as comparison

    found = comparison.compare(earlier, result)
    _say(comparison.summary(found))
    return found.exit_code or (REGRESSION if failed else 0)


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
    help="What goes to stdout.",
)
def compare(
    old: Path, new: Path, relative: float, absolute: float, significance: float, output: str
) -> None:
    """Compare two results of `bench`: has anything become slower?

    Judges the speed-up over the peers that both runs timed; absolute times only warn. Exit codes:
    0 fine, 1 a regression, 2 a file that cannot be read, 3 a red parity check in NEW.
    """
    _require_packages()
    from patchgen_fast.bench import compare as comparison
    from patchgen_fast.bench.results import ResultError

    gate: Gate = comparison.Gate(
        relative=relative / 100, absolute=absolute, significance=significance
    )
    try:
        found = comparison.compare(_read(old), _read(new), gate)
    except ResultError as error:
        _stop(USAGE, str(error))
        return
    if output == "markdown":
        click.echo(comparison.markdown(found))
    elif output == "json":
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(found.changes), indent=1))
    else:
        from patchgen_fast.bench import terminal

        terminal.show_comparison(found)
    sys.exit(found.exit_code)


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
    _require_packages()
    from patchgen_fast.bench import exports as formats
    from patchgen_fast.bench import report as page
    from patchgen_fast.bench.results import ResultError, write_atomically

    wanted = _exports(exports)
    try:
        documents = sorted(((_read(path), path) for path in results), key=lambda d: d[0].started)
        newest, source = documents[-1]
        target = html or source.with_suffix(".html")
        write_atomically(target, page.render([document for document, _ in documents]).encode())
        for name, path in wanted:
            formats.save(newest, name, path)
    except ResultError as error:
        _stop(USAGE, str(error))
        return
    _say("Written: " + ", ".join(str(path) for path in (target, *(path for _, path in wanted))))
