"""Pictures of images: sheets, single files, animations, attention maps, and plots of a run."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import cannot_write, replace_file

GAP, BACKGROUND = 2, 64  # between images, in enlarged pixels, and its grey


def _pil() -> Any:
    from PIL import Image

    return Image


def to_bytes(images: Tensor) -> np.ndarray:
    """Images `[B, C, H, W]`, floats from 0 to 1, as uint8 `[B, H, W, C]`."""
    return (images.detach().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def sheet(images: Tensor, columns: int, *, scale: int | None = None) -> np.ndarray:
    """Images `[B, C, H, W]` row by row on one sheet, uint8 `[height, width, C]`.

    `scale` enlarges every pixel; by default small images to about 64 pixels.
    """
    tiles = to_bytes(images)
    scale = scale or max(1, 64 // max(tiles.shape[1:3]))
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = tiles.shape
    rows = -(-count // columns)
    whole = np.full(
        (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), BACKGROUND, np.uint8
    )
    for index, tile in enumerate(tiles):
        top, left = (
            GAP + k * (size + GAP)
            for k, size in zip(divmod(index, columns), (height, width), strict=True)
        )
        whole[top : top + height, left : left + width] = tile
    return whole


def save_png(path: Path, picture: np.ndarray) -> None:
    """uint8 `[height, width, C]` as PNG, atomically."""
    image = _pil().fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    replace_file(path, lambda partial: image.save(partial, format="PNG", optimize=True))


def save_sheet(path: Path, images: Tensor, columns: int, *, scale: int | None = None) -> None:
    """A sheet of images as PNG."""
    save_png(path, sheet(images, columns, scale=scale))


def save_animation(
    path: Path, frames: Iterable[Tensor], columns: int, *, milliseconds: int = 120
) -> None:
    """Frames, each `[B, C, H, W]`, as an animation that stands still at its end; GIF or APNG.

    Raises ValueError for another suffix than .gif or .png.
    """
    kinds = {".gif": "GIF", ".png": "PNG"}
    if path.suffix.lower() not in kinds:
        raise ValueError(f"expected an animation named *.gif or *.png, got {path.name}")
    pictures = []
    for frame in frames:
        array = sheet(frame, columns)
        pictures.append(_pil().fromarray(array[:, :, 0] if array.shape[2] == 1 else array))
    durations = [milliseconds] * (len(pictures) - 1) + [15 * milliseconds]

    def write(partial: Path) -> None:
        pictures[0].save(
            partial, format=kinds[path.suffix.lower()], save_all=True,
            append_images=pictures[1:], duration=durations, loop=0,
        )  # fmt: skip

    replace_file(path, write)


def _figure_to_file(path: Path, figure: Any) -> None:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)

    def write(partial: Path) -> None:
        partial.write_bytes(buffer.getvalue())

    replace_file(path, write)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_attention(
    path: Path, image: Tensor, maps: Sequence[Tensor], names: Sequence[str], place: int, title: str
) -> None:
    """Where one patch looks: a row a layer, a column a head, the image under the weights.

    Args:
        path: a PNG.
        image: `[C, H, W]`.
        maps: weights of each layer, `[heads, rows, columns]`, NaN where there was nothing to see.
        names: of the layers.
        place: number of the patch that looks, row by row; it gets a frame.
        title: what is shown.
    """
    plt = _pyplot()
    heads = max(len(layer) for layer in maps)
    figure, axes = plt.subplots(
        len(maps), heads, squeeze=False, figsize=(1.5 * heads + 0.6, 1.5 * len(maps) + 0.6),
        layout="constrained",
    )  # fmt: skip
    picture = to_bytes(image[None])[0]
    height, width = picture.shape[:2]
    for row, (layer, name) in enumerate(zip(maps, names, strict=True)):
        rows, columns = layer.shape[1:]
        side = height / rows, width / columns
        for column, weights in enumerate(layer.cpu().numpy()):
            ax = axes[row][column]
            extent = (0, width, height, 0)
            ax.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255, extent=extent)
            ax.imshow(weights, cmap="inferno", vmin=0, alpha=0.65, extent=extent)
            top, left = (k * s for k, s in zip(divmod(place, columns), side, strict=True))
            frame = plt.Rectangle((left, top), side[1], side[0], fill=False, color="cyan", lw=1.5)
            ax.add_patch(frame)
            ax.set(xticks=[], yticks=[])
            if row == 0:
                ax.set_title(f"head {column + 1}", fontsize=8)
        axes[row][0].set_ylabel(name, fontsize=8)
    figure.suptitle(title, fontsize=9)
    _figure_to_file(path, figure)


def save_curves(path: Path, log: Path) -> None:
    """The losses of a run's log.jsonl over its steps as PNG: training, and held-out by task."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    training = [line for line in lines if line["kind"] == "train"]
    for name in sorted({key for line in training for key in line if key.startswith("loss_")}):
        left.plot(
            [line["step"] for line in training],
            [line[name] for line in training],
            lw=0.9,
            label=name.removeprefix("loss_"),
        )
    held_out = [line for line in lines if line["kind"] == "evaluation"]
    for name in sorted({key for line in held_out for key in line if key.startswith("loss")}):
        right.plot(
            [line["step"] for line in held_out], [line[name] for line in held_out], label=name
        )
    for axes, title in ((left, "training loss by head"), (right, "held-out loss by task")):
        axes.set(title=title, xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=8, frameon=False)
    _figure_to_file(path, figure)


def save_single(folder: Path, images: Tensor, name: str = "image") -> list[Path]:
    """Images `[B, C, H, W]` as FOLDER/name-0000.png and so on, in their own size."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    paths = []
    for index, picture in enumerate(to_bytes(images)):
        paths.append(folder / f"{name}-{index:04d}.png")
        save_png(paths[-1], picture)
    return paths


def interleaved(*rows: Tensor, columns: int) -> Tensor:
    """Several sets of images `[B, C, H, W]` as rows of one sheet, `columns` of each at a time."""
    blocks = []
    for begin in range(0, len(rows[0]), columns):
        blocks += [row[begin : begin + columns] for row in rows]
    return torch.cat(blocks)
