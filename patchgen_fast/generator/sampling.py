"""Drawing images patch by patch: with a key-value cache, guidance and known patches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from ..models import patchify, unpatchify
from .heads import SamplingOptions
from .model import PatchGenerator, Task, take_in_order

GENERATE = SamplingOptions()


def noise_for(model: PatchGenerator, batch: int, seed: int) -> Tensor:
    """Standard normal `[batch, N, d]`: all the chance there is in `batch` samples of a seed.

    Made on the CPU, so that every device draws the same samples.
    """
    shape = (batch, model.config.transformer.num_patches, model.config.patch_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def drawing(
    model: PatchGenerator,
    labels: Tensor,
    task: Task,
    noise: Tensor,
    images: Tensor | None = None,
    *,
    head: str | None = None,
    options: SamplingOptions = GENERATE,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Draw the missing patches one by one; yields the canvas `[B, N, C, P_h, P_w]` after each.

    The canvas is one buffer, row by row, written as the drawing goes on; `unpatchify` makes images
    of it. After the first two steps a step allocates nothing that stays.

    Args:
        model: in eval mode; everything else is moved to its device.
        labels: int64 `[B]`, `model.none` where no class is asked for.
        task: order of drawing, what the encoder sees, and how many patches are given.
        noise: `[B, N, d]`, see `noise_for`.
        images: `[B, C, H, W]`, where something is seen or given.
        head: out of the model's; its first by default.
        options: guidance, temperature, steps and method of the flow.
        use_cache: False runs the whole sequence for every patch, as a yardstick.

    Raises ValueError for labels out of range, a head that the model lacks, or a task that needs
    images without any.
    """
    config, heads = model.config.transformer, cast(Any, model.heads)
    name = head or model.config.heads[0]
    if name not in model.heads:
        raise ValueError(f"expected a head out of {', '.join(model.heads)}, got {name!r}")
    if images is None and (task.seen is not None or task.given):
        raise ValueError("expected images for a task that sees or is given patches, got none")
    model.check_labels(labels)

    device = model.label.weight.device
    labels, task = labels.to(device), task.to(device)
    images = None if images is None else images.to(device)
    order = task.order.expand(len(labels), -1)
    memory = model.memory(labels, None if task.seen is None else images, task.seen)
    copies = 1
    if options.guidance != 1.0:
        untold = torch.full_like(labels, model.none)
        seen = None if task.seen is None else images
        memory = torch.cat((memory, model.memory(untold, seen, task.seen)))
        copies = 2

    canvas = memory.new_zeros(len(labels), config.num_patches, *config.patch_shape)
    rows = torch.arange(len(labels), device=canvas.device)
    drawn = None
    if task.given and images is not None:
        whole = images / 255 if images.dtype == torch.uint8 else images
        drawn = take_in_order(patchify(whole, config.patch_size), order)[:, : task.given]
        canvas[rows[:, None], order[:, : task.given]] = drawn.to(canvas.dtype)
    cache = model.decoder.new_cache(memory) if use_cache else None
    draw = heads[name].sampler(options)
    order_of_copies = order.repeat(copies, 1)
    for step in range(task.given, config.num_patches):
        if not use_cache and step > task.given:
            drawn = take_in_order(canvas, order)[:, :step]
        past = None if drawn is None else drawn.repeat(copies, 1, 1, 1, 1)
        states = model.states(past, order_of_copies, memory, cache)[:, -1]
        vectors = draw(states, noise[:, step].to(states))
        patches = model.to_patches(vectors)
        canvas[rows, order[:, step]] = patches
        drawn = patches[:, None]
        yield canvas


def sample(
    model: PatchGenerator,
    labels: Tensor,
    task: Task,
    noise: Tensor,
    images: Tensor | None = None,
    *,
    batch: int = 256,
    head: str | None = None,
    options: SamplingOptions = GENERATE,
    use_cache: bool = True,
) -> Tensor:
    """Images `[B, C, H, W]` from 0 to 1, on the CPU; drawn `batch` at a time, see `drawing`."""
    finished = []
    for begin in range(0, max(1, len(labels)), batch):
        part = slice(begin, begin + batch)
        canvas = None
        for canvas in drawing(  # noqa: B007
            model,
            labels[part],
            task.rows(part),
            noise[part],
            None if images is None else images[part],
            head=head,
            options=options,
            use_cache=use_cache,
        ):
            pass
        if canvas is None:  # everything was given
            assert images is not None
            canvas = patchify(images[part], model.config.transformer.patch_size)
        finished.append(unpatchify(canvas, model.config.transformer.grid_size).cpu())
    return torch.cat(finished)
