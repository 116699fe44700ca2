"""The commands `plan` and `verify`. Only click is imported at the top: help is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

NOTHING, PARITY = 1, 3
"""Exit codes: nothing to swap, parity failure. Wrong usage is 2."""
DTYPES = ("float32", "bfloat16", "float16")

_json = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="PATH",
    help="Write the report as JSON too.",
)
_format = click.option(
    "--format",
    "output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="What goes to stdout.",
)
_backend = click.option("--backend", metavar="NAME", help="Of the fast layers, not the fastest.")


@click.command()
@click.argument("model")
@_backend
@click.option("--strict", is_flag=True, help="Exit with 1 unless every known layer is swapped.")
@_json
@_format
def plan(
    model: str, backend: str | None, strict: bool, json_path: Path | None, output: str
) -> None:
    """Say what swap would do to MODEL, layer by layer, and why not the rest.

    MODEL is timm:NAME, torchvision:NAME, transformers:CONFIG_CLASS, patchgen:NAME or
    module:callable. It is built on the meta device: nothing is computed or downloaded. Exit codes:
    0 something would be swapped, 1 nothing would, 2 wrong usage.
    """
    import torch

    from patchgen_fast.swapping import swap

    source = _find(model)
    _check_backend(backend)
    with torch.device("meta"):
        module = source.make()
    report = swap(module, backend=backend, dry_run=True)
    _deliver(report, json_path, output)
    left = report.with_action("refused", "unsupported")
    if not report.with_action("would swap", "already") or (strict and left):
        raise SystemExit(NOTHING)


@click.command()
@click.argument("model")
@click.option("--batch", default=2, show_default=True, metavar="B", help="Images (or texts).")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu or cuda.")
@_backend
@click.option("--no-gradients", is_flag=True, help="Outputs alone.")
@click.option("--runs", default=3, show_default=True, help="More make a surer verdict.")
@click.option("--seed", default=0, show_default=True, help="Of weights and inputs.")
@_json
@_format
def verify(
    model: str,
    batch: int,
    dtype: str,
    device: str,
    backend: str | None,
    no_gradients: bool,
    runs: int,
    seed: int,
    json_path: Path | None,
    output: str,
) -> None:
    """Hold the swapped MODEL and the eager one against float64, outputs and gradients.

    MODEL is timm:NAME, torchvision:NAME, transformers:CONFIG_CLASS, patchgen:NAME or
    module:callable; but for the last its weights are random. Exit codes: 0 as right as eager, 1
    nothing to swap, 2 wrong usage, 3 not as right.
    """
    import torch

    from patchgen_fast import swapping

    if runs < 1:
        raise click.UsageError(f"--runs: expected at least 1, got {runs}")
    source = _find(model)
    _check_backend(backend)
    kind: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype), "seed": seed}
    try:
        module = source.model(**kind)
        args, kwargs = source.inputs(module, batch, **kind)
    except (ValueError, RuntimeError) as error:
        raise click.UsageError(str(error)) from error
    report = swapping.verify(
        module,
        *args,
        kwargs=kwargs,
        gradients=not no_gradients,
        backend=backend,
        runs=runs,
        seed=seed,
    )
    _deliver(report, json_path, output)
    if not report.ok:
        raise SystemExit(PARITY if report.swapped_layers else NOTHING)


def _find(model: str) -> Any:
    from patchgen_fast import model_source

    try:
        return model_source.find(model)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _check_backend(backend: str | None) -> None:
    from patchgen_fast.modules.state import check_backend

    try:
        check_backend(backend)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _deliver(report: Any, json_path: Path | None, output: str) -> None:
    if json_path is not None:
        from patchgen_fast.bench.results import write_atomically

        try:
            write_atomically(json_path, (report.to_json() + "\n").encode())
        except OSError as error:
            raise click.UsageError(f"--json: {json_path}: {error.strerror}") from error
    click.echo(report.to_json() if output == "json" else str(report))
