"""The generator on 64 x 64 images, eager and swapped: a decode step, a drawing, a training step.

    python benchmarks/generator_speed.py --record benchmarks/results/zen5-generator-speed.json

Patches of 4 x 4, 256 tokens, E 384, 6 + 6 layers, batch 16, float32. Contenders take turns within a
round; what is compared is the median over rounds of the ratio of their times in one round. Before
anything is timed, eager and swapped have to draw the same image.

A whole drawing without a cache takes minutes. Its time is taken from the steps at 8 evenly spaced
places (the middle of every 32 patches), each as long as the 32 around it; drawings with a cache are
timed in the same way and, to check it, as a whole. One thread is timed by its processor time, which
other work on the machine lengthens less. With --record, figures, command and machine are written as
each part ends, so that an interruption loses one part at most.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import patchgen_fast
from patchgen_fast.bench import environment
from patchgen_fast.generator.files import write_json
from patchgen_fast.generator.heads import SamplingOptions
from patchgen_fast.generator.model import GeneratorConfig, PatchGenerator, Task
from patchgen_fast.generator.sampling import noise_for, sample
from patchgen_fast.models import CONFIGS, DecoderCache

BATCH, PATCHES = 16, 256
SPAN = 32
PLACES = range(SPAN // 2, PATCHES, SPAN)
TASK = Task(torch.arange(PATCHES))
LABELS = torch.arange(BATCH) % 10
HEADS = ("flow", "mse")
DRAWINGS = {
    "eager, no cache": ("eager", False),
    "eager, cache": ("eager", True),
    "swapped, cache": ("swapped", True),
}
"""Contenders of a drawing, ours last: whose weights, and whether with a cache."""


def models() -> dict[str, PatchGenerator]:
    """The same weights, eager and swapped."""
    torch.manual_seed(0)
    eager = PatchGenerator(GeneratorConfig(CONFIGS["medium"], num_classes=10)).eval()
    with torch.no_grad():
        for head in eager.heads.values():
            for parameter in head.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    fast = copy.deepcopy(eager)
    patchgen_fast.swap(fast)
    return {"eager": eager, "swapped": fast}


def check_parity(models: dict[str, PatchGenerator]) -> float:
    """The largest difference of 40 patches drawn by both, on the scale 0 to 1."""
    images = torch.zeros(2, 3, 64, 64)
    task = TASK._replace(given=PATCHES - 40)
    drawn = [
        sample(model, LABELS[:2], task, noise_for(model, 2, 0), images) for model in models.values()
    ]
    difference = (drawn[0] - drawn[1]).abs().max().item()
    if not difference < 1e-3:
        raise SystemExit(f"eager and swapped draw different images: {difference}; nothing is timed")
    return difference


class Step:
    """One step of drawing at a place, ready to be repeated: its cache is put back every time."""

    def __init__(self, model: PatchGenerator, head: str, place: int, *, use_cache: bool) -> None:
        shape = model.config.transformer.patch_shape
        self.model, self.draw = model, model.heads[head].sampler(SamplingOptions())
        self.noise = torch.randn(BATCH, model.config.patch_dim)
        self.memory = model.memory(LABELS)
        self.drawn = torch.rand(BATCH, place, *shape)
        self.cache: DecoderCache | None = None
        if use_cache:
            self.cache = model.decoder.new_cache(self.memory)
            shape = model.config.transformer
            heads = shape.decoder_num_heads
            past = torch.randn(BATCH, heads, place, shape.decoder_dim // heads)
            for layer in self.cache.layers:
                layer.own.append(past, past)  # as fast to read as keys and values of patches
            self.drawn = self.drawn[:, -1:]
        self.filled = place

    def __call__(self) -> None:
        if self.cache is not None:
            for layer in self.cache.layers:
                layer.own.length = self.filled
        states = self.model.states(self.drawn, TASK.order, self.memory, self.cache)[:, -1]
        self.model.to_patches(self.draw(states, self.noise))


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    call()
    return clock() - began


Done = Callable[[str], None]
"""Called between timings, with what was timed."""


def time_drawings(
    models: dict[str, PatchGenerator], head: str, rounds: int, done: Done
) -> dict[str, list[float]]:
    """Seconds of a drawing by contender, a value a round."""
    found: dict[str, list[float]] = {name: [] for name in DRAWINGS}
    for _ in range(rounds):
        total = dict.fromkeys(DRAWINGS, 0.0)
        for place in PLACES:
            for name, (model, use_cache) in DRAWINGS.items():
                step = Step(models[model], head, place, use_cache=use_cache)
                if use_cache:
                    step()  # the first one after another contender finds its weights in no cache
                repeats = 4 if use_cache else 1
                total[name] += SPAN * statistics.median(seconds(step) for _ in range(repeats))
                done(f"drawing, head {head}: {name}")
        for name, value in total.items():
            found[name].append(value)
    return found


def time_whole(models: dict[str, PatchGenerator], head: str, done: Done) -> dict[str, list[float]]:
    """Seconds of one whole drawing with a cache."""
    found = {}
    for name, model in models.items():
        noise = noise_for(model, BATCH, 0)
        found[f"{name}, cache"] = [
            seconds(lambda m=model, z=noise: sample(m, LABELS, TASK, z, head=head))
        ]
        done(f"drawing as a whole, head {head}: {name}")
    return found


def time_training(
    models: dict[str, PatchGenerator], rounds: int, done: Done
) -> dict[str, list[float]]:
    """Seconds of a training step that sees all patches: encoder, decoder and heads."""
    config = models["eager"].config
    images = torch.rand(BATCH, 3, 64, 64)
    repeats = config.flow_repeats
    arguments = (
        images,
        LABELS,
        TASK._replace(seen=torch.arange(PATCHES)),
        torch.rand(repeats, BATCH),
        torch.randn(repeats, BATCH, PATCHES, config.patch_dim),
    )
    steps = {}
    for name, model in models.items():
        own = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(own.parameters(), 1e-4, fused=True)

        def step(own: PatchGenerator = own, optimizer: torch.optim.Optimizer = optimizer) -> None:
            torch.stack(list(own(*arguments).values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[name] = step
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            taken = seconds(step)
            if number:  # the first round makes buffers
                found[name].append(taken)
            done(f"training step: {name}")
    return found


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """The median over rounds of how many times faster `fast` is."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


class Record:
    """What was found, printed as it comes and kept in a file, if any."""

    def __init__(self, path: Path | None, difference: float) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "kind": "patchgen_fast.generator.speed",
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["python", *sys.argv]),
            "threads": torch.get_num_threads(),
            "largest difference of a drawn pixel": difference,
            "seconds": {},
            "ratios": {},
            "environment": msgspec.to_builtins(environment.collect()),
        }

    def keep(self, what: str, found: dict[str, list[float]], *slower: str) -> None:
        """Times of contenders, the last one ours, and how many times faster it is."""
        self.content["seconds"][what] = found
        *_, ours = found
        for name, values in found.items():
            print(f"{what:34} {name:16} {statistics.median(values):9.3f} s", flush=True)
        for name in slower:
            times = self.content["ratios"][f"{what}: {name} / {ours}"] = ratio(found, name, ours)
            print(f"{what:34} {name} / {ours}: {times:.2f}", flush=True)
        if self.path is not None:
            write_json(self.path, self.content)


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--part", type=click.Choice(["drawing", "training", "all"]), default="all", show_default=True
)
@click.option(
    "--record",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the figures and the machine there, as JSON.",
)
def main(rounds: int, threads: int, part: str, path: Path | None) -> None:
    """Time the generator on 64 x 64 images, eager and swapped: drawing, and a training step."""
    torch.set_num_threads(threads)
    made = models()
    record = Record(path, check_parity(made))
    total = 0 if part == "training" else len(HEADS) * (rounds * len(PLACES) * len(DRAWINGS) + 2)
    total += 0 if part == "drawing" else 2 * (rounds + 1)
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn between timings only: a thread that redraws would count as processor time.
    with Progress(
        *columns,
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        auto_refresh=False,
    ) as bar:
        task = bar.add_task("", total=total)

        def done(what: str) -> None:
            bar.update(task, description=what, advance=1, refresh=sys.stderr.isatty())

        if part != "training":
            with torch.inference_mode():
                for head in HEADS:
                    found = time_drawings(made, head, rounds, done)
                    record.keep(f"drawing, head {head}", found, "eager, no cache", "eager, cache")
                    found = time_whole(made, head, done)
                    record.keep(f"drawing as a whole, head {head}", found, "eager, cache")
        if part != "drawing":
            record.keep("training step", time_training(made, rounds, done), "eager")


if __name__ == "__main__":
    main()
