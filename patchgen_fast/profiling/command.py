"""The command `profile`. Only click is imported at the top: help is instant."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import click

from patchgen_fast.bench.console import require_writable

DTYPES = ("float32", "bfloat16", "float16")


@click.command()
@click.argument("model")
@click.option("--batch", default=8, show_default=True, metavar="B", help="Images (or texts).")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu or cuda.")
@click.option(
    "--threads",
    type=click.Choice(["one", "all"]),
    default="all",
    show_default=True,
    help="On the CPU; one is pinned to a core.",
)
@click.option("--training", is_flag=True, help="Forward and backward instead of a forward.")
@click.option("--compile", "compiled", is_flag=True, help="Under torch.compile: rows are kernels.")
@click.option("--eager", is_flag=True, help="The model as it is, without fast layers.")
@click.option("--backend", metavar="NAME", help="Of the fast layers, instead of the fastest.")
@click.option("--seconds", default=10.0, show_default=True, help="How long to measure.")
@click.option("--no-calibrate", is_flag=True, help="Spare the seconds that measure the peak.")
@click.option("--every-layer", is_flag=True, help="Do not join layers that differ in number alone.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="PATH",
    help="Write a Kineto trace, *.json.gz, for ui.perfetto.dev and HTA.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="PATH",
    help="Write the profile as JSON too.",
)
@click.option(
    "--format",
    "output",
    type=click.Choice(["text", "markdown", "json"]),
    default="text",
    show_default=True,
    help="What goes to stdout.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
def profile(
    model: str,
    batch: int,
    dtype: str,
    device: str,
    threads: str,
    compiled: bool,
    eager: bool,
    no_calibrate: bool,
    every_layer: bool,
    json_path: Path | None,
    output: str,
    quiet: bool,
    **options: Any,
) -> None:
    """Show where a step of MODEL goes, layer by layer, beside the eager model.

    MODEL is timm:NAME, torchvision:NAME, transformers:CONFIG_CLASS, patchgen:NAME or
    module:callable. Time without the profiler and its shares, FLOP/s of the measured peak, memory,
    speed-up over eager, error against float64, and why a layer is not fast. Exit codes: 0 fine,
    2 wrong usage, 4 no GPU for --device cuda.
    """
    trace = options["trace"]
    require_writable(json_path, trace)
    if trace is not None and not trace.name.endswith(".json.gz"):
        raise click.UsageError(
            f"--trace: expected a name *.json.gz, which viewers open, got {trace}"
        )
    import torch

    from patchgen_fast import model_source
    from patchgen_fast.dispatch import BACKENDS
    from patchgen_fast.profiling.api import profile as run
    from patchgen_fast.profiling.table import as_markdown, as_text

    if options["backend"] not in (None, *BACKENDS):
        raise click.UsageError(
            f"unknown backend {options['backend']!r}; expected one of {', '.join(BACKENDS)}"
        )
    _check_device(device)
    numbers = getattr(torch, dtype)
    try:
        source = model_source.find(model)
        module = source.model(device=device, dtype=numbers)
        args, kwargs = source.inputs(module, batch, device=device, dtype=numbers)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    module.train(options["training"])
    with _progress(quiet) as report, _held(threads, device):
        found = run(
            module,
            *args,
            kwargs=kwargs,
            compile=compiled,
            fast=not eager,
            calibrate=not no_calibrate,
            progress=report,
            **options,
        )
    if json_path is not None:
        from patchgen_fast.bench.results import write_atomically

        write_atomically(json_path, (found.to_json() + "\n").encode())
    if output == "json":
        click.echo(found.to_json())
    else:
        text = as_markdown if output == "markdown" else as_text
        click.echo(text(found, every_layer=every_layer))


def _check_device(device: str) -> None:
    import torch

    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise click.UsageError(f"unknown device {device!r}; expected cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        click.echo("Error: no GPU here; --device cpu profiles on the processor", err=True)
        sys.exit(4)


def _held(threads: str, device: str) -> contextlib.AbstractContextManager[None]:
    from patchgen_fast.bench import machine

    if device != "cpu":
        return contextlib.nullcontext()
    return machine.held(machine.thread_count(threads))


@contextlib.contextmanager
def _progress(quiet: bool) -> Any:
    """One line that is written over on a terminal, a line for each step elsewhere."""
    if quiet:
        yield lambda text: None
        return
    on_terminal, last = sys.stderr.isatty(), ""

    def report(text: str) -> None:
        nonlocal last
        kind = text.lstrip("0123456789 ")
        if on_terminal:
            click.echo(f"\r\033[K{text}", nl=False, err=True)
        elif kind != last:
            click.echo(text, err=True)
        last = kind

    yield report
    if on_terminal:
        click.echo("\r\033[K", nl=False, err=True)
