"""Training a generator: the loop, what it keeps, and how it goes on after an interruption.

    images of a step -> task and noise -> losses of the heads -> AdamW -> averaged weights

The averaged weights (`torch.optim.swa_utils.AveragedModel`) are what is evaluated and saved for
generating.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import patchgen_fast

from . import checkpoint, distributed
from .data import Data
from .logbook import Logbook
from .model import GeneratorConfig, PatchGenerator
from .settings import Settings
from .speed import FlopCounter, peak_flops
from .tasks import Step, new_step, seeded

LOG_EVERY = 10


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; `signal` says by what."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}; continue with --resume --out {path}"
        )
        self.number = number


@dataclass
class Trainer:
    """One run of training in one of the world's processes.

    Args:
        config: the model; its weights are made from `settings.seed`.
        settings: what to do.
        data: what to learn from.
        run: the folder that takes checkpoints, log and pictures.
        world: this process.
        fast: swap the layers for fast ones.
        fsdp: shard the model instead of replicating it.
        quiet: tell nothing on stderr.
        evaluate: called in the first process with the averaged model and the step, every
            `settings.evaluate_every` steps and at the end; gives numbers for the log.
    """

    config: GeneratorConfig
    settings: Settings
    data: Data
    run: Path
    world: distributed.World
    fast: bool = True
    fsdp: bool = False
    quiet: bool = False
    evaluate: Callable[[PatchGenerator, int], dict[str, float]] | None = None
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        rows = self.settings.batch
        if len(self.data.train) < rows:
            raise ValueError(
                f"expected a batch of at most the {len(self.data.train)} training images, "
                f"got {rows}; choose a smaller --batch"
            )
        self.rows, self.parts = self.world.rows(rows, self.settings.accumulate)
        torch.manual_seed(self.settings.seed)
        self.model = PatchGenerator(self.config).to(self.world.device)
        if self.fast:
            patchgen_fast.swap(self.model)
        self.averaged = AveragedModel(self.model, multi_avg_fn=self._average)
        self._maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-step")
        self._ahead: dict[int, Future[Step]] = {}

    def resume(self, path: Path) -> None:
        """Take weights, averages, optimizer and step from a checkpoint of this configuration."""
        description = checkpoint.describe(path)
        saved = checkpoint.load_tensors(path / checkpoint.TRAINING)
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name, tensor in saved.items():
            kind, _, rest = name.partition("/")
            groups[kind][rest] = tensor
        checkpoint.restore(self.model, groups["model"], path / checkpoint.TRAINING)
        averages = checkpoint.load_tensors(path / checkpoint.MODEL)
        checkpoint.restore(self.averaged.module, averages, path / checkpoint.MODEL)
        self.averaged.n_averaged.fill_(description.step)
        self.step = description.step
        self._optimizer_state = groups["optimizer"]

    def train(self) -> None:
        """Run to `settings.steps`. Raises Interrupted after SIGINT or SIGTERM, with all saved."""
        self._spread()
        logbook = (
            Logbook(self.run, self.step, self.settings.steps, quiet=self.quiet)
            if self.world.is_first
            else None
        )
        meter = _Meter(self) if logbook is not None else None
        stop = _StopSignals()
        try:
            with stop:
                while self.step < self.settings.steps:
                    self._one_step(logbook, meter)
                    done = self.step == self.settings.steps
                    stopped = self.world.any(stop.number is not None)
                    if done or stopped or self.step % self.settings.save_every == 0:
                        self._check_finite()
                        self.save()
                    if done or self.step % self.settings.evaluate_every == 0:
                        self._evaluate(logbook, meter)
                    if stopped and not done:
                        raise Interrupted(stop.number or signal.SIGINT, self.run)
        finally:
            if logbook is not None:
                logbook.close()

    def save(self) -> None:
        """Write a checkpoint; all processes call it together."""
        model, averages, optimizer = self._whole_state()
        if self.world.is_first:
            training = {f"model/{name}": tensor for name, tensor in model.items()}
            training |= {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
            description = checkpoint.Description(
                self.config, self.data.classes, self.step, self.settings.to_json()
            )
            checkpoint.save(self.run, description, averages, training)
        self.world.wait()

    def averaged_model(self) -> PatchGenerator:
        """A plain, fast model with the averaged weights; all processes call it together."""
        weights = {n: distributed.whole(t) for n, t in self.averaged.module.state_dict().items()}
        model = PatchGenerator(self.config)
        model.load_state_dict(weights)
        if self.fast:
            patchgen_fast.swap(model)
        return model.to(self.world.device).eval()

    # ------------------------------------------------------------------------------ one step

    def _spread(self) -> None:
        """Lay the model over the processes, and make its optimizer."""
        if self.fsdp and self.world.size > 1:
            distributed.shard(self.model, self.world)
            distributed.shard(self.averaged.module, self.world)
            self.spread: nn.Module = self.model
        else:
            self.spread = distributed.replicate(self.model, self.world)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.settings.lr,
            betas=(0.9, 0.95),
            weight_decay=self.settings.weight_decay,
            fused=True,
        )
        state = getattr(self, "_optimizer_state", {})
        for name, parameter in self.model.named_parameters():
            own = {key: state[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
                   if f"{name}/{key}" in state}  # fmt: skip
            if own:
                self.optimizer.state[parameter] = {
                    key: distributed.like(tensor, parameter).to(self.world.device)
                    for key, tensor in own.items()
                }

    def _one_step(self, logbook: Logbook | None, meter: _Meter | None) -> None:
        settings, step = self.settings, self._next_step()
        rate = settings.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(seeded(settings.seed + 1 + self.world.rank, self.step).initial_seed())
        self.spread.train()
        losses = self._losses = self._backward(step)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.averaged.update_parameters(self.model)
        self.step += 1
        if meter is not None:
            meter.add(step)
        if self.step % LOG_EVERY == 0 or self.step == settings.steps:
            losses = self.world.mean(losses)
            if logbook is not None and meter is not None:
                named = dict(zip(self.config.heads, losses.tolist(), strict=True))
                values = {
                    "task": step.kind,
                    "loss": sum(named.values()),
                    **{f"loss_{name}": value for name, value in named.items()},
                    "lr": rate,
                    "grad_norm": float(distributed.whole(norm)),
                    **meter.rates(),
                }
                logbook.record("train", self.step, values)
                logbook.show(self.step, _line(values))

    def _check_finite(self) -> None:
        """ValueError, in all processes, after a step whose loss is no number."""
        if self.world.any(not bool(self._losses.isfinite().all())):
            raise ValueError(
                f"expected a finite loss, got {self._losses.tolist()} at step {self.step}; what "
                "was saved before is untouched: lower --lr in a new run"
            )

    def _next_step(self) -> Step:
        """The step that is due; the one after it is made meanwhile, in another thread."""
        made = partial(new_step, self.config, self.settings, self.data.train, rows=self.rows)
        due = self._ahead.pop(self.step, None)
        step = due.result() if due is not None else made(step=self.step)
        if self.step + 1 < self.settings.steps:
            self._ahead[self.step + 1] = self._maker.submit(made, step=self.step + 1)
        return step

    def _backward(self, step: Step) -> Tensor:
        """Gradients of the mean loss of a step; the losses `[heads]`, of this process's rows."""
        device, bf16 = self.world.device, self.settings.bf16
        losses = torch.zeros(len(self.config.heads), device=device)
        for number, part in enumerate(self.parts, start=1):
            arguments = step.rows(part, device)[:5]
            if isinstance(self.spread, DistributedDataParallel):
                self.spread.require_backward_grad_sync = number == len(self.parts)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                found = torch.stack(list(self.spread(*arguments).values()))
            (found.sum() / len(self.parts)).backward()
            losses += found.detach() / len(self.parts)
        return losses

    def _average(self, averages: Any, current: Any, count: Tensor | int) -> None:
        """The averaged weights move to the current ones by 1 - decay; decay ramps up to `ema`."""
        decay = min(self.settings.ema, (1 + int(count)) / (10 + int(count)))
        local = [
            [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
            for tensors in (averages, current)
        ]
        torch._foreach_lerp_(local[0], local[1], 1 - decay)

    # ------------------------------------------------------------------ what is kept and told

    def _whole_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        whole = distributed.whole
        model = {name: whole(tensor) for name, tensor in self.model.state_dict().items()}
        averages = {n: whole(tensor) for n, tensor in self.averaged.module.state_dict().items()}
        optimizer = {
            f"{name}/{key}": whole(tensor)
            for name, parameter in self.model.named_parameters()
            for key, tensor in self.optimizer.state.get(parameter, {}).items()
        }
        return model, averages, optimizer

    def _evaluate(self, logbook: Logbook | None, meter: _Meter | None) -> None:
        if self.evaluate is None:
            return
        began = time.perf_counter()
        model = self.averaged_model()
        if logbook is not None and meter is not None:
            values = self.evaluate(model, self.step)
            unreadable = len(self.data.train.unreadable | self.data.held_out.unreadable)
            logbook.record("evaluation", self.step, values | {"unreadable": unreadable})
            text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            logbook.show(self.step, text, now=True)
            meter.leave_out(time.perf_counter() - began)
        self.world.wait()


class _Meter:
    """Images a second and MFU since they were last told."""

    def __init__(self, trainer: Trainer) -> None:
        self._flops_of = FlopCounter(trainer.config)
        peak = peak_flops(trainer.world.device, bf16=trainer.settings.bf16)
        self._processes = trainer.world.size
        self._peak = peak and peak * self._processes
        self._restart()

    def _restart(self) -> None:
        self._images, self._flops, self._began = 0, 0, time.perf_counter()

    def add(self, step: Step) -> None:
        self._images += self._processes * len(step.images)
        self._flops += self._processes * self._flops_of(step)

    def leave_out(self, seconds: float) -> None:
        """Time that did not go into steps."""
        self._began += seconds

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._began
        found = {"images_per_second": self._images / seconds}
        if self._peak:
            found["mfu"] = self._flops / seconds / self._peak
        self._restart()
        return found


class _StopSignals:
    """Takes SIGINT and SIGTERM as a wish to stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._stop)
            except ValueError:  # not the main thread: whoever runs us decides
                return

    def _stop(self, number: int, frame: Any) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def __exit__(self, *error: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


def _line(values: dict[str, Any]) -> str:
    mfu = f", MFU {100 * values['mfu']:.0f} %" if "mfu" in values else ""
    return f"loss {values['loss']:.4f}, {values['images_per_second']:.0f} images/s{mfu}"
