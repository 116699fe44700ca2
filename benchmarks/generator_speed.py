"""The generator on 64 x 64 images, eager and swapped: a decode step, a drawing, a training step.

    python benchmarks/generator_speed.py [--rounds 5] [--record benchmarks/results/FILE.json]

Patches of 4 x 4, 256 tokens, E 384, 6 + 6 layers, batch 16, float32. Contenders take turns within a
round; what is compared is the median over rounds of the ratio of their times in one round. Before
anything is timed, eager and swapped have to draw the same image.

A whole drawing without a cache takes minutes. Its time is taken from the steps at 8 evenly spaced
places (the middle of every 32 patches), each as long as the 32 around it; drawings with a cache are
timed in the same way and, to check it, as a whole. One thread is timed by its processor time, which
other work on the machine lengthens less.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import patchgen_fast
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


def time_drawings(models: dict[str, PatchGenerator], head: str, rounds: int) -> dict[str, list]:
    """Seconds of a drawing by contender, a value a round."""
    contenders = {
        "eager, no cache": ("eager", False),
        "eager, cache": ("eager", True),
        "swapped, cache": ("swapped", True),
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        total = dict.fromkeys(contenders, 0.0)
        for place in PLACES:
            for name, (model, use_cache) in contenders.items():
                step = Step(models[model], head, place, use_cache=use_cache)
                if use_cache:
                    step()  # the first one after another contender finds its weights in no cache
                repeats = 4 if use_cache else 1
                total[name] += SPAN * statistics.median(seconds(step) for _ in range(repeats))
        for name, value in total.items():
            found[name].append(value)
    return found


def time_whole(models: dict[str, PatchGenerator], head: str) -> dict[str, list[float]]:
    """Seconds of one whole drawing with a cache."""
    return {
        f"{name}, cache": [
            seconds(lambda m=model: sample(m, LABELS, TASK, noise_for(m, BATCH, 0), head=head))
        ]
        for name, model in models.items()
    }


def time_training(models: dict[str, PatchGenerator], rounds: int) -> dict[str, list[float]]:
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
    return found


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """The median over rounds of how many times faster `fast` is."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=["drawing", "training", "all"], default="all")
    parser.add_argument("--record", type=Path, help="also write the figures there, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    made = models()
    difference = check_parity(made)
    times: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, float] = {}

    def keep(what: str, found: dict[str, list[float]], *slower: str) -> None:
        """Times of contenders, the last one ours, and how many times faster it is."""
        times[what] = found
        *_, ours = found
        for name, values in found.items():
            print(f"{what:34} {name:16} {statistics.median(values):9.3f} s", flush=True)
        for name in slower:
            ratios[f"{what}: {name} / {ours}"] = ratio(found, name, ours)
            print(
                f"{what:34} {name} / {ours}: {ratios[f'{what}: {name} / {ours}']:.2f}", flush=True
            )

    if options.part != "training":
        with torch.inference_mode():
            for head in ("flow", "mse"):
                drawing = time_drawings(made, head, options.rounds)
                keep(f"drawing, head {head}", drawing, "eager, no cache", "eager, cache")
                keep(f"drawing as a whole, head {head}", time_whole(made, head), "eager, cache")
    if options.part != "drawing":
        keep("training step", time_training(made, options.rounds), "eager")
    if options.record:
        import msgspec

        from patchgen_fast.bench import environment

        write_json(
            options.record,
            {
                "kind": "patchgen_fast.generator.speed",
                "command": f"python benchmarks/generator_speed.py --rounds {options.rounds}",
                "threads": options.threads,
                "largest difference of a drawn pixel": difference,
                "seconds": times,
                "ratios": ratios,
                "environment": msgspec.to_builtins(environment.collect()),
            },
        )


if __name__ == "__main__":
    main()
