"""Times candidate configurations on the user's GPU and keeps those that win: `patchgen-fast tune`.

A case is a self-attention in bfloat16, forward and backward. Each table that its calls ask is
searched on its own: every candidate that compiles and fits is held against the shipped row's
result, then timed with its inputs out of cache. One that is at least 3 % faster than the shipped
row is written to `tuned.path()`, which `Table.choose` prefers as long as GPU, torch, triton and
patchgen_fast are those that it was made with.

Then the backends are timed against each other, forward alone and with the backward, and the fastest
becomes a rule of `thresholds`: which backend a call like this one tries first.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from triton.errors import TritonError

from .. import attention as public_attention
from ..dispatch import BackendRefused
from . import attention, attention_backward, thresholds, tuned
from .attention_configs import BackwardConfig, ShortConfig, StreamConfig
from .configs import Question, Table, answering, asking, reread
from .thresholds import Rule

LEAST_GAIN = 1.03  # less is within the noise of twenty runs
Run = Callable[[], tuple[torch.Tensor, ...]]


class NoGpu(RuntimeError):
    """There is nothing to time kernels on."""


class Case(NamedTuple):
    """A self-attention to tune for; D is the head dimension."""

    name: str
    batch: int
    heads: int
    tokens: int
    d: int

    def __str__(self) -> str:
        return f"{self.name} B{self.batch} H{self.heads} N{self.tokens} D{self.d}"


CASES = (
    Case("mae-encoder", 256, 12, 50, 64),
    Case("vit-b", 128, 12, 197, 64),
    Case("mae-decoder", 256, 16, 197, 32),
    Case("dit", 64, 16, 256, 72),
    Case("vit-l", 64, 16, 577, 64),
    Case("siglip", 32, 16, 729, 72),
    Case("dinov2-g", 16, 24, 1370, 64),
)


@dataclass(frozen=True)
class Outcome:
    """One search's end: microseconds by the shipped row and by the best, which is `config` (None
    where the shipped row stands), and how many candidates were timed.
    """

    case: str
    table: str
    key: str
    before: float
    after: float
    config: dict[str, Any] | None
    timed: int

    def __str__(self) -> str:
        what = f"{self.case}, {self.table}: {self.before:.1f} us"
        if self.config is None:
            return f"{what}, the shipped configuration stands ({self.timed} others timed)"
        options = ", ".join(f"{name} {value}" for name, value in self.config.items())
        return f"{what} -> {self.after:.1f} us, {self.before / self.after:.2f} times, by {options}"


@dataclass(frozen=True)
class Choice:
    """Which backend is the fastest for a case: microseconds of each that ran and was right."""

    case: str
    rule: Rule
    times: dict[str, float]

    def __str__(self) -> str:
        what = "forward and backward" if self.rule.training else "forward"
        times = ", ".join(f"{name} {time:.1f} us" for name, time in self.times.items())
        return f"{self.case}, {what}: {self.rule.backend} first ({times})"


def candidates(config: Any) -> Iterator[Any]:
    """Configurations worth a try in place of one."""
    if isinstance(config, ShortConfig):
        for block_m, warps in ((32, 2), (64, 4), (128, 8)):
            for stages in (1, 2):
                for one_pass in (True, False):
                    yield ShortConfig(block_m, warps, stages, one_pass)
    elif isinstance(config, (StreamConfig, BackwardConfig)):
        for block_m in (32, 64, 128):
            for block_n in (32, 64, 128):
                for warps in (4, 8):
                    for stages in (1, 2, 3):
                        yield type(config)(block_m, block_n, warps, stages)


def microseconds(run: Run, repeats: int = 20) -> float:
    """Median time of `run` on the GPU with a cold L2: a buffer larger than it is written before."""
    flush = torch.empty(256 * 1024 * 1024, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def packed(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of random numbers, as a projection leaves them."""
    shape = (case.batch, case.tokens, 3, case.heads, case.d)
    qkv = torch.randn(shape, dtype=torch.bfloat16, device=device)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return query, key, value


def calls(case: Case, device: str) -> tuple[Run, Run]:
    """The case's forward and backward by our kernels, on random numbers."""
    query, key, value = packed(case, device)
    rest = (None, None, None, False, case.d**-0.5)
    out, lse = attention.attention(query, key, value, *rest)
    grad = torch.randn_like(out)

    def forward() -> tuple[torch.Tensor, ...]:
        return attention.attention(query, key, value, *rest)[:1]

    def backward() -> tuple[torch.Tensor, ...]:
        return attention_backward.attention_backward(
            grad, None, query, key, value, out, lse, *rest, False
        )[:3]

    return forward, backward


def tune(
    cases: tuple[Case, ...] = CASES,
    *,
    device: str = "cuda",
    timer: Callable[[Run], float] = microseconds,
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[Outcome | Choice]:
    """Searches, and yields what each search found; what won is in the file by then.

    Args:
        cases: the shapes to tune for.
        device: where to run; "cpu" serves only under Triton's interpreter.
        timer: microseconds that a call takes.
        progress: told (candidates done, of how many, what is searched).

    Raises:
        NoGpu: without a CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise NoGpu(
            "tune: expected a CUDA device to time kernels on; found none. The shipped "
            "configurations serve without it"
        )
    for case in cases:
        for run in calls(case, device):
            with asking() as asked:
                run()
            for table, question in dict.fromkeys(asked):
                if table.shipped(question) is None:
                    continue
                outcome = _search(str(case), table, question, run, timer, progress)
                _keep(outcome)
                reread(table)
                yield outcome
        for training in (False, True):
            choice = _compare(case, training, device, timer)
            if choice is not None:
                _keep_rule(choice.rule)
                yield choice


def _search(
    case: str,
    table: Table[Any],
    question: Question,
    run: Run,
    timer: Callable[[Run], float],
    progress: Callable[[int, int, str], None] | None,
) -> Outcome:
    """The fastest candidate that is right, if it beats the shipped row."""
    shipped = table.shipped(question)
    with answering(table, shipped):
        expected = run()
        before = timer(run)
    others = [candidate for candidate in candidates(shipped) if candidate != shipped]
    best, after, timed = None, before / LEAST_GAIN, 0
    for done, candidate in enumerate(others):
        if progress is not None:
            progress(done, len(others), f"{case}, {table.name}")
        with answering(table, candidate):
            try:
                right = all(map(_close, run(), expected))
            except TritonError:
                continue  # too large for this chip
            if not right:
                continue
            time = timer(run)
        timed += 1
        if time < after:
            best, after = candidate, time
    key = table.key(question)
    if best is None:
        return Outcome(case, table.name, key, before, before, None, timed)
    return Outcome(case, table.name, key, before, after, asdict(best), timed)


def _close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results of the same sums in another order agree to their dtype's rounding."""
    most = 4 * torch.finfo(got.dtype).eps * expected.abs().max().item()
    return bool(((got.float() - expected.float()).abs() <= most).all())


def _keep(outcome: Outcome) -> None:
    """Writes the outcome into the file; without a configuration the shipped row stands again."""
    document = tuned.read()
    configs = {k: config for k, config in document["configs"].items() if k != outcome.key}
    if outcome.config is not None:
        configs[outcome.key] = outcome.config
    tuned.write(configs=configs, gains={**document["gains"], outcome.key: asdict(outcome)})


COMPARED = ("torch", "triton", "cuda")


def _compare(
    case: Case, training: bool, device: str, timer: Callable[[Run], float]
) -> Choice | None:
    """The fastest of the backends that take the case and agree with torch; None if torch fails."""
    query, key, value = (x.detach().requires_grad_(training) for x in packed(case, device))
    grad = torch.randn_like(query.transpose(1, 2)).transpose(1, 2)
    times: dict[str, float] = {}
    expected: tuple[torch.Tensor, ...] = ()
    for backend in COMPARED:

        def run(backend: str = backend) -> tuple[torch.Tensor, ...]:
            out = public_attention(query, key, value, backend=backend)
            assert isinstance(out, torch.Tensor)
            return torch.autograd.grad(out, (query, key, value), grad) if training else (out,)

        try:
            results = run()
        except BackendRefused:
            continue
        expected = expected or results
        if all(map(_close, results, expected)):
            times[backend] = timer(run)
    if "torch" not in times:
        return None
    best = min(times, key=lambda name: times[name])
    if times["torch"] < times[best] * LEAST_GAIN:
        best = "torch"
    return Choice(str(case), Rule(case.d, case.tokens, training, best), times)


def _keep_rule(rule: Rule) -> None:
    """Writes the rule into the file, in place of one for the same calls."""
    others = [other for other in tuned.read()["dispatch"] if other[:3] != list(rule[:3])]
    tuned.write(dispatch=[*others, list(rule)])
    thresholds.forget()
