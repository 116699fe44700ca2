"""Timing core for the CPU: interleaved rounds in balanced order, disturbed rounds thrown away.

One round times every contender once. Rounds, not contenders, are repeated, so that a change of
clock frequency or a noisy neighbour falls on all contenders alike, and the ratio within a round
survives it. A short sentinel loop of known work runs before and after each round; a round whose
sentinel was slow, or in which a sample waited for the processor, is discarded as a whole; several
threads wait for one another rightly, so theirs are discarded where other work took a core from
them, and are marked as disturbed where other work ran beside them at all. On a machine that is
never quiet, the quietest quarter of the rounds is kept and marked as disturbed, and a thread's
samples count by the time that it worked, without that for which it waited. All rounds would not do:
what shares vector units and caches slows eager more than ours.

A virtual machine's processors may be moved apart and together again. Whether they share a cache
shows in how long a line takes from one to the other; with several threads it is measured before
each round, and rounds with the cores farther apart than in the nearest ones are discarded.

Nothing here imports torch. The clock and the sentinel are arguments, so the tests drive them.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np


class Clock(Protocol):
    """Nanosecond clocks: elapsed time, processor time of the whole process and of all other work on
    the machine; and how often other work has taken a core from this process.
    """

    def wall(self) -> int: ...

    def cpu(self) -> int: ...

    def others(self) -> int: ...

    def preemptions(self) -> int: ...


class SystemClock:
    """The machine's clocks."""

    wall = staticmethod(time.perf_counter_ns)
    cpu = staticmethod(time.process_time_ns)

    @staticmethod
    def others() -> int:
        """0 where the system does not say (only Linux does), as if there were no other work."""
        try:
            with open("/proc/stat") as file:
                # user nice system idle iowait irq softirq steal, in ticks, summed over the cores
                ticks = [int(field) for field in file.readline().split()[1:9]]
        except OSError:
            return 0
        busy = sum(ticks) - ticks[3] - ticks[4]
        return busy * 1_000_000_000 // os.sysconf("SC_CLK_TCK") - time.process_time_ns()

    @staticmethod
    def preemptions() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@dataclass(frozen=True)
class Plan:
    """How long to measure one case, and what counts as disturbed."""

    budget_s: float = 4.0  # of timed rounds, for all contenders of a case together
    min_rounds: int = 10
    max_rounds: int = 60
    warmup_s: float = 0.15  # per contender
    sample_s: float = 0.002  # calls shorter than this are repeated within a sample
    overrun: float = 3.0  # no more replacements for disturbed rounds after this many budgets
    sentinel_slack: float = 1.08  # a sentinel this much above its quiet time marks a disturbance
    waiting_slack: float = 0.03  # share of a sample not spent on the processor, one thread only
    preemptions: float = 50.0  # a second, beyond one a sample, several threads only
    apart: float = 2.0  # a handover this many times the shortest is one between other cores
    others: float = 0.1  # cores that other work took on average, several threads only
    quietest: float = 0.25  # share of the rounds that is kept of a machine that is never quiet

    def scaled(self, factor: float) -> Plan:
        """The same plan with another time budget."""
        return replace(
            self, budget_s=self.budget_s * factor, warmup_s=self.warmup_s * min(factor, 1.0)
        )


FULL = Plan()
QUICK = Plan(budget_s=0.9, min_rounds=5, max_rounds=25, warmup_s=0.05)


@dataclass
class Samples:
    """Kept samples of one case: seconds per call, one list per contender, paired by position."""

    seconds: dict[str, list[float]]
    first_call_s: dict[str, float]
    calls_per_sample: dict[str, int]
    discarded: int = 0
    undisturbed: bool = True
    handover_s: float | None = None  # of the kept rounds, from core to core; None: not measured
    sentinel_s: list[float] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values()), []))


def balanced_orders(names: Sequence[str]) -> Iterator[list[str]]:
    """Endless orders in which every contender follows every other equally often.

    Plain rotation would keep each contender behind the same one, and with it that one's effect on
    caches and allocator. Source: Williams (1949), squares balanced for first residual effects.
    """
    n = len(names)
    zigzag = [0]
    for step in range(1, n):
        zigzag.append((step + 1) // 2 if step % 2 else n - step // 2)
    while True:
        for shift in range(n):
            yield [names[(i + shift) % n] for i in zigzag]
        if n % 2:  # an odd number of contenders needs the mirrored square as well
            for shift in range(n):
                yield [names[(i + shift) % n] for i in reversed(zigzag)]


def repeats_for(seconds_per_call: float, plan: Plan) -> int:
    """Calls per sample so that a sample lasts about `plan.sample_s`."""
    if seconds_per_call <= 0.0:
        return 1000
    return max(1, min(100_000, round(plan.sample_s / seconds_per_call)))


def measure(
    contenders: Mapping[str, Callable[[], object]],
    plan: Plan,
    *,
    clock: Clock | None = None,
    sentinel: Callable[[], object] | None = None,
    handover: Callable[[], float] | None = None,
    single_thread: bool = True,
    on_round: Callable[[int, int], None] | None = None,
) -> Samples:
    """Time the contenders against each other.

    contenders: name -> a function of no arguments; its result is dropped.
    sentinel: a short loop of constant work; None trusts the clocks alone.
    handover: seconds that a cache line takes from core to core now; asked for with several threads.
    single_thread: compare elapsed with processor time (one thread only: with more, a thread
        that waits for its team waits rightly).
    on_round: called with (kept rounds, discarded rounds).
    """
    if not contenders:
        raise ValueError("measure: expected at least one contender, got none")
    clock = clock or SystemClock()
    first, repeats = _warm_up(contenders, plan, clock)
    samples = Samples({name: [] for name in contenders}, first, repeats)
    rounds: list[Round] = []
    quiet = _QuietTime()
    if sentinel:
        for _ in range(5):
            quiet.add(_sensed(sentinel, clock))
    others, started = clock.others(), clock.wall()
    if single_thread:
        handover = None
    for order in balanced_orders(list(contenders)):
        distance = handover() if handover else 0.0
        before = _sensed(sentinel, clock) if sentinel else 0.0
        measured = _round(order, contenders, repeats, clock)
        after = _sensed(sentinel, clock) if sentinel else 0.0
        quiet.add(before)
        quiet.add(after)
        rounds.append(measured._replace(sentinel=max(before, after), handover=distance))
        nearest = min(one.handover for one in rounds)
        good = [
            one
            for one in rounds
            if not one.interrupted(plan, single_thread)
            and not quiet.exceeded(one.sentinel, plan.sentinel_slack)
            and one.handover <= plan.apart * nearest
        ]
        bad = len(rounds) - len(good)
        if on_round:
            on_round(len(good), bad)
        elapsed = (clock.wall() - started) * 1e-9
        enough = len(good) >= plan.min_rounds and elapsed >= plan.budget_s
        tired = len(good) + bad >= plan.min_rounds and elapsed >= plan.budget_s * plan.overrun
        if enough or tired or len(good) >= plan.max_rounds:
            break
    if len(good) < plan.min_rounds:
        good, samples.undisturbed = _quietest(rounds, plan, single_thread), False
    others, elapsed_ns = clock.others() - others, clock.wall() - started
    if not single_thread and others > plan.others * elapsed_ns:
        samples.undisturbed = False
    samples.discarded = len(rounds) - len(good)
    if handover:
        samples.handover_s = float(np.median([one.handover for one in good]))
    for one in good:
        samples.sentinel_s.append(one.sentinel)
        by_work = single_thread and not samples.undisturbed
        for name, seconds in (one.worked if by_work else one.elapsed).items():
            samples.seconds[name].append(seconds)
    return samples


class Round(NamedTuple):
    """One sample of each contender: seconds per call, elapsed and on the processor."""

    elapsed: dict[str, float]
    worked: dict[str, float]
    waited: float  # the largest share of a sample spent off the processor
    preempted: float  # the most times a second that a core was taken away, beyond once a sample
    sentinel: float = 0.0  # seconds of the slower of the two around it
    handover: float = 0.0  # seconds from core to core before it; 0 where nobody asks

    def interrupted(self, plan: Plan, single_thread: bool) -> bool:
        """Whether other work got in between."""
        if single_thread:
            return self.waited > plan.waiting_slack
        return self.preempted > plan.preemptions


def _quietest(rounds: Sequence[Round], plan: Plan, single_thread: bool) -> list[Round]:
    """The rounds in which all contenders together were fastest, each against its own best."""
    times = [one.worked if single_thread else one.elapsed for one in rounds]
    best = {name: min(one[name] for one in times) or 1.0 for name in times[0]}
    slowness = [sum(seconds / best[name] for name, seconds in one.items()) for one in times]
    count = max(plan.min_rounds, math.ceil(plan.quietest * len(rounds)))
    kept = sorted(sorted(range(len(rounds)), key=lambda i: slowness[i])[:count])
    return [rounds[i] for i in kept]


class _QuietTime:
    """The sentinel's undisturbed time: the lower quartile of all its runs in this case."""

    def __init__(self) -> None:
        self.runs: list[float] = []

    def add(self, seconds: float) -> None:
        self.runs.append(seconds)

    def exceeded(self, seconds: float, slack: float) -> bool:
        return seconds > slack * float(np.quantile(self.runs, 0.25))


def _timed(call: Callable[[], object], clock: Clock) -> float:
    start = clock.wall()
    call()
    return (clock.wall() - start) * 1e-9


def _sensed(sentinel: Callable[[], object], clock: Clock) -> float:
    """The better of two runs: a timer's interrupt hits one of them, a busy machine both."""
    return min(_timed(sentinel, clock), _timed(sentinel, clock))


def _warm_up(
    contenders: Mapping[str, Callable[[], object]], plan: Plan, clock: Clock
) -> tuple[dict[str, float], dict[str, int]]:
    """Call each contender until it is warm; its first call and its calls per sample."""
    first: dict[str, float] = {}
    repeats: dict[str, int] = {}
    for name, call in contenders.items():
        first[name] = _timed(call, clock)
        fastest = first[name]
        start, calls = clock.wall(), 0
        while calls < 2 or (clock.wall() - start) * 1e-9 < plan.warmup_s:
            fastest = min(fastest, _timed(call, clock))
            calls += 1
            if fastest > plan.warmup_s:
                break
        repeats[name] = repeats_for(fastest, plan)
    return first, repeats


def _round(
    order: Sequence[str],
    contenders: Mapping[str, Callable[[], object]],
    repeats: Mapping[str, int],
    clock: Clock,
) -> Round:
    """A sample of each contender in this order."""
    elapsed: dict[str, float] = {}
    worked: dict[str, float] = {}
    waited = preempted = 0.0
    for name in order:
        call, count = contenders[name], repeats[name]
        if count > 1:
            call()  # evict the previous contender's data; a longer call evicts it for itself
        taken, cpu, start = clock.preemptions(), clock.cpu(), clock.wall()
        for _ in range(count):
            call()
        wall, work = clock.wall() - start, clock.cpu() - cpu
        taken = clock.preemptions() - taken
        if wall > 0:
            waited = max(waited, 1.0 - work / wall)
            preempted = max(preempted, (taken - 1) / (wall * 1e-9))
        elapsed[name], worked[name] = wall * 1e-9 / count, work * 1e-9 / count
    return Round(elapsed, worked, waited, preempted)
