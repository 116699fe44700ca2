"""Drawing images patch by patch: with a key-value cache, guidance and known patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from ..models import patchify, unpatchify
from ..models.graph import GraphedStep
from ..modules.recording import is_recording
from .heads import SamplingOptions
from .model import PatchGenerator, Task, take_in_order

GENERATE = SamplingOptions()


def noise_for(model: PatchGenerator, batch: int, seed: int) -> Tensor:
    """Standard normal `[batch, N, d]`: all the chance there is in `batch` samples of a seed.

    Made on the CPU, so that every device draws the same samples.
    """
    shape = (batch, model.config.transformer.num_patches, model.config.patch_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Steps:
    """The steps of one drawing and the buffers that they share; see `drawing`.

    `canvas` `[B, N, C, P_h, P_w]` is written as the drawing goes on. With guidance the decoder has
    two copies of every image, the second without the condition.
    """

    def __init__(
        self,
        model: PatchGenerator,
        head: Any,
        labels: Tensor,
        task: Task,
        noise: Tensor,
        images: Tensor | None,
        options: SamplingOptions,
        use_cache: bool,
    ) -> None:
        config = model.config.transformer
        self.model, self.given = model, task.given
        self.memory = model.memory(labels, None if task.seen is None else images, task.seen)
        self.copies = 1
        if options.guidance != 1.0:
            untold = torch.full_like(labels, model.none)
            seen = None if task.seen is None else images
            self.memory = torch.cat((self.memory, model.memory(untold, seen, task.seen)))
            self.copies = 2
        self.order = task.order.expand(len(labels), -1).contiguous()
        self.rows = torch.arange(len(labels), device=self.order.device)
        self.noise = noise.to(self.memory)
        self.canvas = self.memory.new_zeros(len(labels), config.num_patches, *config.patch_shape)
        if task.given and images is not None:
            whole = images / 255 if images.dtype == torch.uint8 else images
            drawn = take_in_order(patchify(whole, config.patch_size), self.order)[:, : task.given]
            places = self.order[:, : task.given]
            self.canvas[self.rows[:, None], places] = drawn.to(self.canvas.dtype)
        self.cache = model.decoder.new_cache(self.memory) if use_cache else None
        self.draw = head.sampler(options)

    def usual(self, step: int) -> None:
        """Draw the patch that is `step`-th in order; what is there already costs nothing more."""
        known = 0 if self.cache is None else max(self.cache.length - 1, 0)  # a start came first
        drawn = None
        if step:
            places = self.order[:, known:step]
            drawn = self._of_copies(self.canvas[self.rows[:, None], places])
        states = self.model.states(drawn, self._of_copies(self.order), self.memory, self.cache)
        self._draw(states[:, -1], self.noise[:, step], self.order[:, step])

    def from_position(self, position: Tensor) -> None:
        """The same with a cache that has had its first step, where the step is data, int64 `[1]`:
        no value is read by the host, and all positions have the same shapes and buffers.
        """
        model, cache = self.model, self.cache
        assert cache is not None
        cache.follow(position, len(self.memory))
        before, now = (self.order.index_select(1, at) for at in (position - 1, position))
        drawn = self._of_copies(self.canvas[self.rows[:, None], before])
        tokens = model.embed_drawn(drawn, self._of_copies(before))
        states = model.decoder.states(tokens, self.memory, cache, places=self._of_copies(now))
        self._draw(states[:, -1], self.noise.index_select(1, position)[:, 0], now[:, 0])

    def _of_copies(self, x: Tensor) -> Tensor:
        return x if self.copies == 1 else torch.cat((x, x))

    def _draw(self, states: Tensor, noise: Tensor, places: Tensor) -> None:
        self.canvas[self.rows, places] = self.model.to_patches(self.draw(states, noise))


def may_capture(device: torch.device) -> bool:
    """Whether a step may become a CUDA graph. Attention weights are recorded beside the layers, of
    which a graph would hold those of one step only.
    """
    return device.type == "cuda" and not is_recording()


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
    use_graph: bool = True,
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
        use_graph: on a CUDA device and with a cache, capture the second step as a CUDA graph and
            replay it for the patches after it. False launches every kernel of every step, as is
            done wherever there is no such device.

    Raises ValueError for labels out of range, a head that the model lacks, or a task that needs
    images without any.
    """
    heads = cast(Any, model.heads)
    name = head or model.config.heads[0]
    if name not in model.heads:
        raise ValueError(f"expected a head out of {', '.join(model.heads)}, got {name!r}")
    if images is None and (task.seen is not None or task.given):
        raise ValueError("expected images for a task that sees or is given patches, got none")
    model.check_labels(labels)

    device = model.label.weight.device
    images = None if images is None else images.to(device)
    steps = Steps(
        model, heads[name], labels.to(device), task.to(device), noise, images, options, use_cache
    )
    graphed = use_graph and use_cache and may_capture(device)
    step: Callable[[int], None] = steps.usual
    for number in range(task.given, model.config.transformer.num_patches):
        step(number)
        yield steps.canvas
        if graphed and number == task.given:  # the first step has made the cache's buffers
            step = GraphedStep(steps.from_position, device)


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
    use_graph: bool = True,
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
            use_graph=use_graph,
        ):
            pass
        if canvas is None:  # everything was given
            assert images is not None
            canvas = patchify(images[part], model.config.transformer.patch_size)
        finished.append(unpatchify(canvas, model.config.transformer.grid_size).cpu())
    return torch.cat(finished)
