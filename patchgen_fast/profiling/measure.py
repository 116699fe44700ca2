"""Time a step without any observer and with one, round by round, so that shares can be trusted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .timeline import Place, Timeline

MIN_ROUNDS, MAX_ROUNDS, WARM_UP = 5, 60, 2
QUIET = 0.97  # share of a round that its thread spends on the processor
Progress = Callable[[str], None]


@dataclass
class Watched:
    """One model's rounds: seconds a step unobserved, and seconds by place and direction.

    A round is quiet if its thread never waited for the processor; with more than one thread that
    can't be told, since a thread that waits for its team waits rightly.
    """

    steps: list[float] = field(default_factory=list)
    quiet: list[bool] = field(default_factory=list)
    parts: list[dict[tuple[Place, str], float]] = field(default_factory=list)
    calls: dict[Place, int] = field(default_factory=dict)

    def keep_quiet(self) -> bool:
        """Drop the other rounds, if enough are quiet; whether they are."""
        if sum(self.quiet) < MIN_ROUNDS:
            return False
        for name in ("steps", "parts"):
            values = getattr(self, name)
            setattr(self, name, [v for v, quiet in zip(values, self.quiet, strict=True) if quiet])
        self.quiet = [True] * len(self.steps)
        return True

    def seconds(self, choose: Callable[[Place, str], bool]) -> list[float]:
        """Round by round, what the chosen places took together."""
        return [
            sum(value for (place, way), value in part.items() if choose(place, way))
            for part in self.parts
        ]


def make_step(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], training: bool
) -> Callable[[], Any]:
    """A forward in inference mode; or a forward, and a backward of the outputs' mean square."""

    def infer() -> Any:
        with torch.inference_mode():
            return model(*args, **kwargs)

    def train() -> None:
        with torch.enable_grad():
            outputs = pytree.tree_leaves(model(*args, **kwargs))
            floats = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
            torch.stack([x.float().square().mean() for x in floats]).sum().backward()
        model.zero_grad(set_to_none=True)

    return train if training else infer


def measure(
    models: list[tuple[nn.Module, Callable[[], Any]]],
    layers: dict[str, nn.Module],
    device: torch.device,
    budget: float,
    progress: Progress = lambda text: None,
) -> list[Watched]:
    """Rounds of every model in turn, each unobserved and observed, for `budget` seconds.

    At least MIN_ROUNDS, at most MAX_ROUNDS. On a GPU the marks are events in its own stream.
    """
    cuda = device.type == "cuda"
    results = [Watched() for _ in models]
    for _, step in models:
        for _ in range(WARM_UP):
            step()
    started = time.perf_counter()
    for rounds in range(1, MAX_ROUNDS + 1):
        for result, (model, step) in zip(results, models, strict=True):
            wall, worked = time.perf_counter(), time.process_time()
            result.steps.append(unobserved(step, cuda))
            timeline = Timeline(model, layers, _recorded_event if cuda else time.perf_counter)
            with timeline.watching():
                step()
            if cuda:
                torch.cuda.synchronize()
                result.parts.append(timeline.parts(_between_events))
            else:
                result.parts.append(timeline.parts())
            wall, worked = time.perf_counter() - wall, time.process_time() - worked
            result.quiet.append(cuda or torch.get_num_threads() > 1 or worked > QUIET * wall)
            result.calls = dict(timeline.calls)
        progress(f"{rounds} rounds")
        if rounds >= MIN_ROUNDS and time.perf_counter() - started > budget:
            break
    return results


def unobserved(step: Callable[[], Any], cuda: bool) -> float:
    """Seconds of one step, from an idle device to an idle device."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_events(before: torch.cuda.Event, after: torch.cuda.Event) -> float:
    return before.elapsed_time(after) * 1e-3
