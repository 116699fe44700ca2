"""What one training step is about: which images, what is told of them, and its noise.

All chance of a step comes from a generator seeded by (seed, step), for the whole batch at once: a
resumed run goes on as if it had not stopped, and many devices, each with its rows, compute what one
would.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .augment import augment
from .data import ImageSet
from .model import GeneratorConfig, Task
from .orders import drawing_order
from .settings import Settings

# How often a step is about each task.
SHARES = {"class": 0.4, "completion": 0.35, "reconstruction": 0.15, "variation": 0.1}
LABELS_WITH_IMAGES = 0.2  # where patches are seen, the class is told this often


class Step(NamedTuple):
    """The arguments of `PatchGenerator.forward`, and the name of the task."""

    images: Tensor
    labels: Tensor
    task: Task
    times: Tensor
    noise: Tensor
    kind: str = ""

    def rows(self, part: slice, device: torch.device) -> Step:
        """The step for some of its images, on a device."""

        return Step(
            self.images[part].to(device),
            self.labels[part].to(device),
            self.task.rows(part).to(device),
            self.times[:, part].to(device),
            self.noise[:, part].to(device),
            self.kind,
        )


def seeded(seed: int, step: int) -> torch.Generator:
    """A generator on the CPU for one step of a run; neighbouring steps have nothing in common."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63
    return torch.Generator().manual_seed(mixed)


def images_of_step(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Indices `[batch]` out of `count` images: every epoch is another permutation."""
    per_epoch = count // batch
    epoch, place = divmod(step, per_epoch)
    shuffled = torch.randperm(count, generator=seeded(seed, -1 - epoch))
    return shuffled[place * batch : (place + 1) * batch]


def new_task(kind: str, config: GeneratorConfig, batch: int, chance: torch.Generator) -> Task:
    """A task of a kind; how much of the images is seen is drawn, and which part."""
    grid, patches = config.transformer.grid_size, config.transformer.num_patches
    order = drawing_order(config.order, grid, batch=batch, generator=chance)
    if kind == "class":
        return Task(order)
    if kind == "reconstruction":
        return Task(order, seen=torch.arange(patches))
    share = int(torch.randint(1, max(2, patches), (), generator=chance))
    if kind == "completion":
        return Task(order, seen=order[..., :share], given=min(share, patches - 1))
    if kind == "variation":
        places = drawing_order("random", grid, batch=batch, generator=chance)
        return Task(order, seen=places[:, :share])
    raise ValueError(f"expected a task out of {', '.join(SHARES)}, got {kind!r}")


def new_step(
    config: GeneratorConfig,
    settings: Settings,
    data: ImageSet,
    step: int,
    rows: slice = slice(None),
) -> Step:
    """Step `step`, counted from 0, on the CPU: these rows of it. No other images are loaded."""
    chance = seeded(settings.seed, step)
    batch = settings.batch
    indices = images_of_step(len(data), batch, settings.seed, step)[rows]
    of_images = torch.rand(7, batch, generator=chance)[:, rows]
    images = augment(data.load(indices), settings.augment, of_images)
    weights = torch.tensor(list(SHARES.values()))
    kind = list(SHARES)[int(weights.multinomial(1, generator=chance))]
    untold = settings.label_dropout if kind == "class" else 1 - LABELS_WITH_IMAGES
    labels = data.labels_of(indices)
    forgotten = torch.rand(batch, generator=chance)[rows] < untold
    labels = torch.where(forgotten, config.num_classes, labels)
    task = new_task(kind, config, batch, chance).rows(rows)
    repeats = config.flow_repeats
    times = torch.rand(repeats, batch, generator=chance)[:, rows]
    shape = (repeats, batch, config.transformer.num_patches, config.patch_dim)
    noise = torch.randn(shape, generator=chance)[:, rows]
    return Step(images, labels, task, times, noise, kind)
