"""`patchgen-fast train`. Only click is imported at the top: help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .data import Data
    from .model import GeneratorConfig, PatchGenerator

STOPPED_BY = 128  # plus the signal's number: the exit status of a run that was interrupted
SHEET_COLUMNS = 10
EPOCH_AT_LEAST = 250  # steps: where epochs are short, evaluating each would take most of the time


@click.command()
@click.option(
    "--data",
    default="digits",
    show_default=True,
    metavar="SET",
    help="digits, folder:PATH, cifar10:PATH or imagenet:PATH.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("results/generator"),
    show_default=True,
    metavar="RUN",
    help="Folder for checkpoints, log and pictures.",
)
@click.option("--resume", is_flag=True, help="Go on with the last checkpoint in RUN.")
@click.option(
    "--image-size", type=int, help="Side of the images [default: 8 digits, 32 CIFAR, 64]."
)
@click.option("--patch-size", type=int, help="Side of a patch [default: a grid of 4, 8 or 16].")
@click.option(
    "--channels", type=click.Choice(["1", "3"]), help="Grey or RGB [default: digits grey]."
)
@click.option("--dim", type=int, help="Features of a token [default: 64 for digits, 384].")
@click.option("--depth", type=int, help="Encoder layers [default: 2 for digits, 6].")
@click.option("--decoder-depth", type=int, help="Decoder layers [default: 3 for digits, 6].")
@click.option("--heads", type=int, help="Attention heads [default: 4 for digits, 6].")
@click.option(
    "--head",
    "sampling_heads",
    default="flow,mse",
    show_default=True,
    metavar="LIST",
    help="How patches are predicted: flow, pixels, mse; the first one samples.",
)
@click.option(
    "--order",
    type=click.Choice(["raster", "spiral", "random"]),
    default="raster",
    show_default=True,
    help="In which order patches are drawn.",
)
@click.option("--steps", type=int, default=2000, show_default=True, help="Optimizer steps.")
@click.option("--batch", type=int, default=64, show_default=True, help="Images a step, in all.")
@click.option("--accumulate", type=int, default=1, show_default=True, help="Parts of a step.")
@click.option("--lr", type=float, default=2e-3, show_default=True, help="Highest learning rate.")
@click.option("--warmup", type=int, default=100, show_default=True, help="Steps to reach it.")
@click.option("--weight-decay", type=float, default=0.05, show_default=True)
@click.option("--clip", type=float, default=1.0, show_default=True, help="Gradient norm; 0: any.")
@click.option("--ema", type=float, default=0.998, show_default=True, help="Decay of the averages.")
@click.option(
    "--label-dropout", type=float, default=0.1, show_default=True, help="Labels not told."
)
@click.option(
    "--augment",
    type=click.Choice(["none", "flip", "affine"]),
    help="Changes of the images [default: affine for digits, else flip].",
)
@click.option("--bf16", is_flag=True, help="Products in bfloat16 (torch.autocast).")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--evaluate-every", type=int, metavar="STEPS", help="[default: an epoch, at least 250]."
)
@click.option(
    "--samples",
    type=int,
    metavar="COUNT",
    help="Samples for the evaluation at the end; 0: none [default: 1000 for digits, else 0].",
)
@click.option("--save-every", type=int, default=250, show_default=True, metavar="STEPS")
@click.option("--strict", is_flag=True, help="Stop at an unreadable image instead of skipping it.")
@click.option("--eager", is_flag=True, help="Plain PyTorch layers instead of the fast ones.")
@click.option("--fsdp", is_flag=True, help="Under torchrun: shard the model (FSDP2), not DDP.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda if there is one]."
)
@click.option("--threads", type=int, help="Threads on the CPU.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(out: Path, resume: bool, **options: Any) -> None:
    """Train a generator of images, patch by patch.

    RUN/checkpoints keeps the last two checkpoints, RUN/log.jsonl the losses, RUN/samples-*.png what
    the model draws. Ctrl-C stops after the step and saves; --resume goes on exactly where a run
    stopped. `torchrun --nproc-per-node N -m patchgen_fast train ...` takes N devices.
    """
    import torch

    from . import checkpoint, distributed
    from .training import Interrupted, Trainer

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    config, settings, data = _plan(options)
    with distributed.joined(options["device"]) as world:
        trainer = Trainer(
            config,
            settings,
            data,
            out,
            world,
            fast=not options["eager"],
            fsdp=options["fsdp"],
            quiet=options["quiet"],
            evaluate=lambda model, step: _evaluate(model, step, data, out),
        )
        if resume:
            path = checkpoint.find(out)
            _check_same_run(path, config, settings.to_json())
            trainer.resume(path)
        elif (out / "checkpoints").exists():
            raise click.UsageError(
                f"{out} holds a run already: pass --resume to go on with it, or another --out"
            )
        try:
            trainer.train()
        except Interrupted as stopped:
            if world.is_first:
                click.echo(str(stopped), err=True)
            sys.exit(STOPPED_BY + stopped.number)
        model = trainer.averaged_model()
        if world.is_first:
            _finish(model, data, out, options)


def _plan(options: dict[str, Any]) -> tuple[GeneratorConfig, Any, Data]:
    """The model's shape, the settings and the data that the command line asks for."""
    from ..models import PatchTransformerConfig
    from .data import open_data
    from .model import GeneratorConfig
    from .settings import Settings

    kind = options["data"].partition(":")[0]
    small = kind == "digits"
    side = options["image_size"] or {"digits": 8, "cifar10": 32}.get(kind, 64)
    channels = int(options["channels"] or (1 if small else 3))
    heads = options["heads"] or (4 if small else 6)
    data = open_data(
        options["data"], image_size=(side, side), channels=channels, strict=options["strict"]
    )
    dim = options["dim"] or (64 if small else 384)
    transformer = PatchTransformerConfig(
        image_size=side,
        patch_size=options["patch_size"] or (side // 4 if side < 32 else 4),
        channels=channels,
        dim=dim,
        depth=options["depth"] or (2 if small else 6),
        num_heads=heads,
        decoder_dim=dim,
        decoder_depth=options["decoder_depth"] or (3 if small else 6),
        decoder_num_heads=heads,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )
    config = GeneratorConfig(
        transformer,
        num_classes=len(data.classes),
        heads=tuple(options["sampling_heads"].split(",")),
        order=options["order"],
        levels=data.levels,
        flow_width=64 if small else 256,
        flow_depth=2 if small else 3,
        flow_repeats=2 if small else 4,
    )
    same = ("data", "steps", "batch", "accumulate", "lr", "warmup", "weight_decay", "clip", "ema",
            "label_dropout", "bf16", "seed", "strict", "save_every")  # fmt: skip
    settings = Settings(
        **{name: options[name] for name in same},
        augment=options["augment"] or ("affine" if small else "flip"),
        evaluate_every=options["evaluate_every"]
        or max(EPOCH_AT_LEAST, len(data.train) // options["batch"]),
    )
    return config, settings, data


def _check_same_run(path: Path, config: GeneratorConfig, settings: dict[str, Any]) -> None:
    """ValueError where a run would go on as another than it began; places may have moved."""
    from . import checkpoint

    before = checkpoint.describe(path)
    free = {"data", "save_every", "evaluate_every", "strict"}
    changed = [
        f"{name} {before.settings.get(name)} -> {value}"
        for name, value in settings.items()
        if name not in free and before.settings.get(name) != value
    ]
    if before.config != config:
        changed.append("the model's shape")
    if changed:
        raise ValueError(
            f"expected the settings that {path} began with, got other ones: {', '.join(changed)}; "
            "pass the same options, or another --out for a new run"
        )


def _evaluate(model: PatchGenerator, step: int, data: Data, out: Path) -> dict[str, float]:
    """Held-out losses, and a sheet of samples: a column a class, or just samples."""
    import torch

    from .evaluation import held_out_loss
    from .heads import SamplingOptions
    from .model import Task
    from .orders import drawing_order
    from .pictures import save_sheet
    from .sampling import noise_for, sample
    from .tasks import seeded

    losses = {f"loss {k}": v for k, v in held_out_loss(model, data.held_out).items()}
    columns = min(SHEET_COLUMNS, len(data.classes) or SHEET_COLUMNS)
    labels = torch.arange(4 * columns) % columns if data.classes else torch.full((4 * columns,), 0)
    grid = model.config.transformer.grid_size
    order = drawing_order(model.config.order, grid, batch=len(labels), generator=seeded(0, 0))
    noise = noise_for(model, len(labels), seed=0)
    drawn = sample(model, labels, Task(order), noise, options=SamplingOptions(guidance=2.0))
    save_sheet(out / f"samples-{step:08d}.png", drawn, columns)
    return losses


def _finish(model: PatchGenerator, data: Data, out: Path, options: dict[str, Any]) -> None:
    """The evaluation of what was trained, and where everything is."""
    from .evaluation import evaluate
    from .files import write_json
    from .heads import SamplingOptions

    written = ["checkpoints", "log.jsonl", "samples-*.png"]
    count = options["samples"]
    if count is None:
        count = 1000 if options["data"] == "digits" else 0
    if count:
        guidance = 2.0 if data.classes else 1.0
        table = evaluate(model, data, count=count, options=SamplingOptions(guidance=guidance))
        write_json(out / "evaluation.json", table)
        written.append("evaluation.json")
        width = max(map(len, table))
        click.echo("\n".join(f"{name:{width}}  {value:8.4f}" for name, value in table.items()))
    try:
        from .pictures import save_curves

        save_curves(out / "curves.png", out / "log.jsonl")
        written.append("curves.png")
    except ImportError:
        click.echo("no plot of the losses: matplotlib is not installed", err=True)
    skipped = len(data.train.unreadable | data.held_out.unreadable)
    if skipped:
        click.echo(f"{skipped} unreadable images were skipped (see the warnings)", err=True)
    if not options["quiet"]:
        click.echo(f"in {out}: {', '.join(written)}", err=True)
