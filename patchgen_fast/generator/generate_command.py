"""`patchgen-fast generate`. Only click is imported at the top: help is instant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor

    from .model import PatchGenerator, Task

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("checkpoint", type=FILE)
@click.option("--class", "label", metavar="NAME", help="What to draw: a class, by name or number.")
@click.option("--complete", type=FILE, metavar="IMAGE", help="Keep a part of it, draw the rest.")
@click.option("--given", type=float, default=0.5, show_default=True, help="The share that is kept.")
@click.option("--reconstruct", type=FILE, metavar="IMAGE", help="Draw it anew from its encoding.")
@click.option("--variations", type=FILE, metavar="IMAGE", help="Draw others like it.")
@click.option(
    "--seen",
    type=float,
    default=0.5,
    show_default=True,
    help="For --variations: the share of patches, at random, that the encoder sees.",
)
@click.option("--resize", is_flag=True, help="Cut and resize IMAGE to the model's size.")
@click.option("--count", type=int, default=10, show_default=True, help="How many images.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same draws the same.")
@click.option(
    "--guidance", type=float, help="How closely the class is followed [default: 2 with --class]."
)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0: no chance.")
@click.option("--flow-steps", type=int, default=8, show_default=True, help="Steps of the flow.")
@click.option("--method", type=click.Choice(["heun", "euler"]), default="heun", show_default=True)
@click.option(
    "--head", metavar="NAME", help="flow, pixels or mse, as trained [default: the first]."
)
@click.option("--batch", type=int, default=256, show_default=True, help="Images at a time.")
@click.option("--out", type=FILE, metavar="PNG", help="The sheet [default: generated.png].")
@click.option("--columns", type=int, default=10, show_default=True, help="Of the sheet.")
@click.option("--singles", type=FILE, metavar="FOLDER", help="Also each image as a file.")
@click.option(
    "--animation", type=FILE, metavar="FILE", help="Also as drawn, patch by patch: GIF or APNG."
)
@click.option(
    "--attention", type=FILE, metavar="FOLDER", help="Also where the first image's patches looked."
)
@click.option(
    "--place", type=int, help="For --attention: number of the patch [default: the middle]."
)
@click.option("--eager", is_flag=True, help="Plain PyTorch layers instead of the fast ones.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda if there is one]."
)
@click.option("--threads", type=int, help="Threads on the CPU.")
@click.option(
    "--graph/--no-graph",
    default=True,
    show_default=True,
    help="On a CUDA device, capture a step of drawing as a CUDA graph and replay it.",
)
def command(checkpoint: Path, **options: Any) -> None:
    """Draw images with a trained generator.

    CHECKPOINT is a run of `patchgen-fast train` (its last checkpoint) or one checkpoint in it. Say
    at most one of --class, --complete, --reconstruct and --variations; without any, images of no
    class in particular are drawn.
    """
    import torch

    import patchgen_fast

    from . import checkpoint as checkpoints
    from .pictures import save_sheet, save_single
    from .sampling import noise_for, sample

    _check(options)
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    device = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    path = checkpoints.find(checkpoint)
    model, description = checkpoints.load_model(path, device)
    if not options["eager"]:
        patchgen_fast.swap(model)

    labels, task, images = _what(model, description.classes, options)
    how = {
        "head": options["head"],
        "options": _sampling(options),
        "use_graph": options["graph"],
    }
    noise = noise_for(model, len(labels), options["seed"])
    drawn = sample(model, labels, task, noise, images, batch=options["batch"], **how)

    out = options["out"] or Path("generated.png")
    save_sheet(out, drawn, options["columns"])
    written = [out]
    if options["singles"]:
        written += save_single(options["singles"], drawn)[:1]
    if options["animation"]:
        shown = slice(0, options["batch"])
        _animate(
            options["animation"], model, _rows(labels, task, noise, images, shown), how, options
        )
        written.append(options["animation"])
    if options["attention"]:
        written += _attention(
            options["attention"], model, drawn, labels, task, images, options["place"]
        )
    click.echo("\n".join(str(path) for path in written))


def _check(options: dict[str, Any]) -> None:
    """Usage errors, before anything is loaded."""
    modes = [f"--{n}" for n in ("complete", "reconstruct", "variations") if options[n]]
    if options["label"] is not None and not options["complete"]:
        modes.insert(0, "--class")
    if len(modes) > 1:
        raise click.UsageError(f"expected at most one of {', '.join(modes)}")
    for name, least in (("count", 1), ("batch", 1), ("columns", 1), ("flow_steps", 1), ("seed", 0)):
        if options[name] < least:
            raise click.UsageError(
                f"--{name.replace('_', '-')}: expected at least {least}, got {options[name]}"
            )
    for name in ("given", "seen"):
        if not 0 <= options[name] <= 1:
            raise click.UsageError(f"--{name}: expected a share from 0 to 1, got {options[name]}")


def _sampling(options: dict[str, Any]) -> Any:
    from .heads import SamplingOptions

    guidance = options["guidance"]
    if guidance is None:
        guidance = 2.0 if options["label"] is not None else 1.0
    return SamplingOptions(
        guidance, options["temperature"], options["flow_steps"], options["method"]
    )


def _what(
    model: PatchGenerator, classes: tuple[str, ...], options: dict[str, Any]
) -> tuple[Tensor, Task, Tensor | None]:
    """Labels `[B]`, the task and the images that the command line asks for."""
    import torch

    from .data import read_image
    from .evaluation import completion_task
    from .model import Task
    from .orders import drawing_order
    from .tasks import seeded

    config, count, seed = model.config, options["count"], options["seed"]
    device = model.label.weight.device
    label = model.none if options["label"] is None else _label(options["label"], classes)
    labels = torch.full((count,), label, device=device)
    file = options["complete"] or options["reconstruct"] or options["variations"]
    images = None
    if file:
        shape = config.transformer
        image = read_image(file, shape.image_size_pair, shape.channels, fit=options["resize"])
        images = (image[None] / 255).expand(count, -1, -1, -1).to(device)
    grid, patches = config.transformer.grid_size, config.transformer.num_patches
    order = drawing_order(config.order, grid, batch=count, generator=seeded(seed, 0))
    if options["complete"]:
        task = completion_task(model, options["given"], batch=count, seed=seed)
    elif options["reconstruct"]:
        task = Task(order, seen=torch.arange(patches))
    elif options["variations"]:
        seen = max(1, round(options["seen"] * patches))
        places = drawing_order("random", grid, batch=count, generator=seeded(seed, 1))
        task = Task(order, seen=places[:, :seen])
    else:
        task = Task(order)
    return labels, task.to(device), images


def _label(name: str, classes: tuple[str, ...]) -> int:
    """The number of a class that is given by name or number."""
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    if not classes:
        raise ValueError(f"expected no --class, because the model has no classes, got {name!r}")
    shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    raise ValueError(
        f"expected a class out of {shown} or a number from 0 to {len(classes) - 1}, got {name!r}"
    )


def _rows(labels: Any, task: Any, noise: Any, images: Any, part: slice) -> tuple:
    """The arguments of `drawing` for some of the images."""
    return labels[part], task.rows(part), noise[part], None if images is None else images[part]


def _animate(file: Path, model: Any, arguments: tuple, how: dict, options: dict[str, Any]) -> None:
    """The drawing as an animation: a frame a patch, or a row of patches where they are many."""
    import torch

    from ..models import unpatchify
    from .pictures import save_animation
    from .sampling import drawing

    grid = model.config.transformer.grid_size
    every = 1 if grid[0] * grid[1] <= 64 else grid[1]
    frames = []
    for number, canvas in enumerate(drawing(model, *arguments, **how), start=1):
        if number % every == 0 or number == grid[0] * grid[1]:
            frames.append(unpatchify(canvas.clone(), grid))
    if not frames:
        raise ValueError("expected something to draw for an animation, but everything was given")
    empty = torch.zeros_like(frames[0])
    save_animation(file, [empty, *frames], options["columns"])


def _attention(
    folder: Path, model: Any, drawn: Any, labels: Any, task: Any, images: Any, place: int | None
) -> list[Path]:
    """Pictures of where the first image's patch looked: decoder, memory, and encoder."""
    from .interpretation import save_maps

    rows, columns = model.config.transformer.grid_size
    place = (rows // 2) * columns + columns // 2 if place is None else place
    if not 0 <= place < rows * columns:
        raise ValueError(f"expected --place from 0 to {rows * columns - 1}, got {place}")
    one = slice(0, 1)
    labels, task, _, images = _rows(labels, task, labels, images, one)
    return save_maps(folder, model, drawn[:1], labels, task, place, seen_in=images)
