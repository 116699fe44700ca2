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
WAITING = 0.03  # of a step: a quiet round waits no longer for the processor
Progress = Callable[[str], None]
Parts = dict[tuple[Place, str], float]  # seconds by place and direction


@dataclass
class Watched:
    """One model's rounds: seconds a step unobserved, and seconds by place and direction.

    A round is quiet if its thread never waited for the processor; with more than one thread that
    can't be told, since a thread that waits for its team waits rightly. `worked` are the same
    figures without the time that the thread waited.
    """

    steps: list[float] = field(default_factory=list)
    parts: list[Parts] = field(default_factory=list)
    worked: list[tuple[float, Parts]] = field(default_factory=list)
    quiet: list[bool] = field(default_factory=list)
    calls: dict[Place, int] = field(default_factory=dict)

    def keep_quiet(self) -> bool:
        """Drop the other rounds, if enough are quiet; else keep all by the time worked.

        Returns whether enough are quiet.
        """
        if sum(self.quiet) < MIN_ROUNDS:
            if self.worked:
                self.steps = [step for step, _ in self.worked]
                self.parts = [parts for _, parts in self.worked]
            return False
        rounds = zip(self.steps, self.parts, self.quiet, strict=True)
        kept = [(step, parts) for step, parts, quiet in rounds if quiet]
        self.steps, self.parts = [step for step, _ in kept], [parts for _, parts in kept]
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
    alone = not cuda and torch.get_num_threads() == 1
    results = [Watched() for _ in models]
    for _, step in models:
        for _ in range(WARM_UP):
            step()
    started = time.perf_counter()
    for rounds in range(1, MAX_ROUNDS + 1):
        for result, (model, step) in zip(results, models, strict=True):
            step_s, worked_s = unobserved(step, cuda)
            timeline = Timeline(model, layers, _recorded_event if cuda else _clocks)
            with timeline.watching():
                step()
            if cuda:
                torch.cuda.synchronize()
            result.steps.append(step_s)
            result.parts.append(timeline.parts(_between_events if cuda else _elapsed))
            if alone:
                worked = timeline.parts(_worked)
                result.worked.append((worked_s, worked))
                waited = step_s + sum(result.parts[-1].values()) - worked_s - sum(worked.values())
                result.quiet.append(waited < WAITING * step_s)
            else:
                result.quiet.append(True)
            result.calls = dict(timeline.calls)
        progress(f"{rounds} rounds")
        if rounds >= MIN_ROUNDS and time.perf_counter() - started > budget:
            break
    return results


def unobserved(step: Callable[[], Any], cuda: bool) -> tuple[float, float]:
    """Seconds of one step, from an idle device to an idle device; and those on the processor."""
    if cuda:
        torch.cuda.synchronize()
    start = _clocks()
    step()
    if cuda:
        torch.cuda.synchronize()
    end = _clocks()
    return _elapsed(start, end), _worked(start, end)


def _clocks() -> tuple[float, float]:
    """Elapsed time, and processor time of the whole process."""
    return time.perf_counter(), time.process_time()


def _elapsed(before: tuple[float, float], after: tuple[float, float]) -> float:
    return after[0] - before[0]


def _worked(before: tuple[float, float], after: tuple[float, float]) -> float:
    return after[1] - before[1]


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_events(before: torch.cuda.Event, after: torch.cuda.Event) -> float:
    return before.elapsed_time(after) * 1e-3
