"""The command `tune`. Only click is imported at the top: help is instant."""

from __future__ import annotations

import sys

import click

USAGE, NO_GPU = 2, 4


def _stop(code: int, text: str) -> None:
    click.echo(f"Error: {text}", err=True)
    sys.exit(code)


def _progress(done: int, of: int, what: str) -> None:
    click.echo(f"\r\033[K{what}: candidate {done + 1} of {of}", nl=False, err=True)


def _clear() -> None:
    click.echo("\r\033[K", nl=False, err=True)


@click.command()
@click.option(
    "--case",
    "names",
    multiple=True,
    metavar="NAME",
    help="Only this shape; repeatable. See --list.",
)
@click.option("--list", "listing", is_flag=True, help="The shapes, and nothing more.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
def tune(names: tuple[str, ...], listing: bool, quiet: bool) -> None:
    """Search this GPU's fastest configurations of the Triton attention kernels, then time them
    beside torch's and the CUDA C++ kernels, so that later calls try the fastest first.

    Every candidate is compiled, held against the shipped configuration's result, and timed with a
    cold cache; what is at least 3 % faster is written to a file that later calls prefer, as long as
    GPU, torch, triton and patchgen_fast stay the same. The file is written after each search, so
    that stopping loses nothing. The first run compiles some hundred kernels: minutes a shape.

    The file is $XDG_CACHE_HOME/patchgen_fast/tuned.json (~/.cache); PATCHGEN_FAST_TUNED names
    another.

    Exit status: 0 done, 2 wrong arguments, 4 no CUDA device or no Triton.
    """
    from . import unavailable_reason

    if reason := unavailable_reason():
        _stop(NO_GPU, f"tune: {reason}")
    from .tune import CASES, NoGpu, Outcome, tune
    from .tuned import path

    if listing:
        click.echo("\n".join(str(case) for case in CASES))
        return
    known = {case.name: case for case in CASES}
    unknown = [name for name in names if name not in known]
    if unknown:
        expected = ", ".join(known)
        _stop(USAGE, f"tune: expected --case to be one of {expected}; got {', '.join(unknown)}")
    cases = tuple(known[name] for name in dict.fromkeys(names)) or CASES
    lively = not quiet and sys.stderr.isatty()
    gains = 0
    try:
        for outcome in tune(cases, progress=_progress if lively else None):
            if lively:
                _clear()
            click.echo(str(outcome))
            gains += isinstance(outcome, Outcome) and outcome.config is not None
    except NoGpu as error:
        _stop(NO_GPU, str(error))
    click.echo(f"{gains} configurations faster than the shipped ones, in {path()}")
