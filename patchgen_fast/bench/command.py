"""The command `bench`. Only click is imported at the top: help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from patchgen_fast.bench.console import (
    INTERRUPTED,
    NO_GPU,
    USAGE,
    read,
    require_packages,
    require_writable,
    say,
    stop,
    wanted_exports,
)

DEFAULT_FOLDER = "results"


@click.command()
@click.option(
    "--suite",
    default=None,
    metavar="NAME",
    help="standard (the default), ops, layers, models, cpu (all of these), gpu, quick.",
)
@click.option("--quick", is_flag=True, help="The quick suite, short rounds: under two minutes.")
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Only this op; repeatable.")
@click.option(
    "--case", "names", multiple=True, metavar="NAME", help="Only this case, as vit_b; repeatable."
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="SIZES",
    help="Only cases of these sizes, as 'N197 D64'; repeatable.",
)
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
    help="What goes to stdout; a table that goes to a file is markdown.",
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
    3 a red parity check, 4 no GPU under --require-gpu, 130 interrupted (--resume goes on).
    """
    from patchgen_fast.bench import cases as case_list

    suite = suite or ("quick" if quick else "standard")
    try:
        chosen = case_list.select(suite, peers=peers, **filters)
    except case_list.UsageError as error:
        raise click.UsageError(str(error)) from error
    if list_only:
        for case in chosen:
            click.echo(f"{case.id}\t{case.shape}")
        return
    require_packages()
    from patchgen_fast.bench import session
    from patchgen_fast.bench.results import ResultError

    wanted = wanted_exports(exports)
    path = json_path or Path(DEFAULT_FOLDER) / f"bench-{suite}.json"
    if baseline and baseline.resolve() == path.resolve():
        raise click.UsageError(
            f"--baseline is {path}, which this run writes; choose another --json"
        )
    require_writable(path, markdown_path, plot_path, *(target for _, target in wanted))
    quick = quick or suite == "quick"
    try:
        earlier = read(baseline) if baseline else None
        _check_gpu(chosen, require_gpu)
        result = session.measure(chosen, path, suite, quick, resume, quiet, peers, filters, earlier)
    except ResultError as error:
        stop(USAGE, str(error))
    except KeyboardInterrupt:
        stop(INTERRUPTED, f"interrupted; {path} keeps what was measured, --resume goes on")
    written = session.write_reports(result, path, markdown_path, plot_path, wanted)
    session.show(result, output)
    say("Written: " + ", ".join(str(item) for item in written))
    sys.exit(session.verdict(result, earlier))


def _check_gpu(chosen: list[Any], require_gpu: bool) -> None:
    if not any(case.device == "cuda" for case in chosen):
        if require_gpu:
            raise click.UsageError(
                "--require-gpu with a suite that has no GPU case; use --suite gpu"
            )
        return
    import torch

    if not torch.cuda.is_available():
        if require_gpu:
            stop(NO_GPU, "no GPU here, and --require-gpu was given")
        say("No GPU here: GPU cases are shown as skipped.")
