"""Run cases: parity first, then the timing of those that passed, each case saved as it ends."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from patchgen_fast import dispatch
from patchgen_fast.bench import calibrate, gpu_timing, limits, machine, parity, stats
from patchgen_fast.bench import problems as problem_set
from patchgen_fast.bench import timing as cpu_timing
from patchgen_fast.bench.cases import Case
from patchgen_fast.bench.problems.base import (
    Absent,
    Contender,
    Problem,
    Refused,
    Runnable,
    evaluate,
    first_line,
    gradients_of,
    timed_call,
)
from patchgen_fast.bench.results import ResultWriter
from patchgen_fast.bench.schema import (
    ABSENT,
    ERROR,
    OK,
    RED,
    REFUSED,
    SKIPPED,
    Calibration,
    CaseResult,
    Cell,
    Parity,
    Ratio,
    ResultFile,
    Timing,
)
from patchgen_fast.profiling.trace import peak_memory

STEADY = 0.1  # ratios that scatter more are a disturbed measurement; 0.03 is usual in quiet
Progress = Callable[[str, Case, str], None]  # (event "start" | "step" | "end", case, text)


@dataclass
class Options:
    """How to run, apart from which cases."""

    plan: cpu_timing.Plan = cpu_timing.FULL
    quick: bool = False
    peers: tuple[str, ...] = ()  # only these peers; empty: all
    clock: cpu_timing.Clock | None = None  # tests put in their own
    sentinel: Callable[[], object] | None = None
    handover: Callable[[], float] | None = None  # None: not measured
    build: Callable[[Case], Problem] | None = None  # None: problems.build
    calibrate: Callable[[str, int], Calibration | None] | None = None
    progress: Progress = field(default=lambda event, case, text: None)


class Store(Protocol):
    """What a case needs of a result writer: the document, and saving it."""

    result: ResultFile

    def save(self) -> None: ...


def run(cases: Iterable[Case], writer: ResultWriter, options: Options) -> None:
    """Measure every case that the result does not hold yet, and save after each."""
    done = {case.id for case in writer.result.cases if case.status != ERROR}
    sentinel = options.sentinel or calibrate.make_sentinel()
    for case in cases:
        if case.id in done:
            continue
        options.progress("start", case, "")
        result = run_case(case, writer, options, sentinel)
        writer.add(result)
        options.progress("end", case, result.status)
    writer.finish()


def run_case(
    case: Case, writer: Store, options: Options, sentinel: Callable[[], object]
) -> CaseResult:
    """One case, whatever happens: an exception becomes the case's status and reason."""
    threads = machine.thread_count(case.threads) if case.device == "cpu" else 1
    result = CaseResult(
        id=case.id,
        op=case.op,
        case=case.name,
        level=case.level,
        shape=case.shape,
        dtype=case.dtype,
        phase=case.phase,
        device=case.device,
        threads=threads,
        status=OK,
    )
    if case.device == "cuda" and not torch.cuda.is_available():
        result.status, result.reason = SKIPPED, "no GPU here"
        return result
    started = time.perf_counter()
    try:
        calibration = _calibration(case, threads, writer, options)
        problem = (options.build or problem_set.build)(case)
        result.items, result.reason = problem.items, problem.note
        result.cost = limits.bind(problem.cost, case.dtype, calibration)
        options.progress("step", case, "float64 truth")
        referee = Referee(case, problem)  # by all threads: it is not timed
        with machine.held(threads):
            runnables, first_calls = _checked(case, problem, result, referee, options)
            grads = referee.grads
            del referee
            _time(case, result, problem, runnables, first_calls, grads, options, sentinel)
    except Absent as reason:
        result.status, result.reason = ABSENT, str(reason)
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:  # the suite goes on, and shows what happened
        result.status, result.reason = ERROR, f"{type(error).__name__}: {first_line(error)}"
    result.seconds_spent = time.perf_counter() - started
    gc.collect()
    return result


def _calibration(case: Case, threads: int, writer: Store, options: Options) -> Calibration | None:
    """The peaks for this device and thread count, measured when first needed in this run."""
    known = writer.result.calibration(case.device, threads)
    if known:
        return known
    options.progress("step", case, "calibrating")
    if options.calibrate:
        measured = options.calibrate(case.device, threads)
    elif case.device == "cuda":
        measured = gpu_timing.calibrate()
    else:
        with machine.held(threads):
            measured = calibrate.calibrate_cpu(threads, samples=9 if options.quick else 25)
    if measured:
        writer.result.calibrations.append(measured)
        writer.save()
    return measured


def _time(
    case: Case,
    result: CaseResult,
    problem: Problem,
    runnables: dict[str, Runnable],
    first_calls: dict[str, float],
    grads: list[torch.Tensor],
    options: Options,
    sentinel: Callable[[], object],
) -> None:
    """Time what passed the parity check, unless ours did not: then nothing is timed."""
    ours = result.ours
    if ours is None or ours.status != OK:
        result.status = ours.status if ours else ERROR
        result.reason = ours.reason if ours else "the problem has no contender of ours"
        return
    calls = {name: timed_call(runnable, case.phase, grads) for name, runnable in runnables.items()}
    if case.device == "cuda":
        gpu_timing.measure(result, calls, options.plan)
    else:
        samples = cpu_timing.measure(
            calls,
            options.plan,
            clock=options.clock,
            sentinel=sentinel,
            handover=options.handover,
            single_thread=result.threads == 1,
            on_round=lambda kept, dropped: options.progress(
                "step", case, f"{kept} rounds" + (f", {dropped} disturbed" if dropped else "")
            ),
        )
        fill_in(result, samples)
        own_memory = {one.name for one in problem.contenders if one.own_memory}
        for cell in result.cells:
            if cell.timing and cell.name not in own_memory:
                cell.peak_memory = peak_memory(calls[cell.name])
    for cell in result.cells:
        if cell.timing:
            cell.timing.first_call = first_calls[cell.name]


def _checked(
    case: Case,
    problem: Problem,
    result: CaseResult,
    referee: Referee,
    options: Options,
) -> tuple[dict[str, Runnable], dict[str, float]]:
    """Make every contender, hold each against the truth; those that pass, and their first calls."""
    kept: dict[str, Runnable] = {}
    first_calls: dict[str, float] = {}
    for contender in problem.contenders:
        cell = Cell(name=contender.name, role=contender.role, status=OK)
        result.cells.append(cell)
        reason = _left_out(contender, case, options)
        if reason:
            cell.status, cell.reason = SKIPPED, reason
            continue
        options.progress("step", case, f"parity of {contender.name}")
        started = time.perf_counter()
        try:
            with dispatch.counting() as ran:
                runnable = contender.make()
                values = evaluate(runnable, case.phase, referee.grads)
        except Absent as why:
            cell.status, cell.reason = ABSENT, str(why)
            continue
        except (Refused, dispatch.BackendRefused, NotImplementedError) as why:
            cell.status, cell.reason = REFUSED, first_line(why)
            continue
        except Exception as error:
            if contender.role == "eager":
                raise  # without the yardstick there is no case
            cell.status = ERROR
            cell.reason = f"{type(error).__name__}: {first_line(error)}"
            continue
        first_calls[contender.name] = time.perf_counter() - started
        if contender.role == "ours":
            cell.backend = backends_of(ran)
        cell.parity = referee.judge(contender.role, values)
        wrong = parity.wrong(cell.parity)
        if wrong and contender.role != "eager":
            cell.status, cell.reason = RED, "; ".join(wrong[:3])
            continue
        kept[contender.name] = runnable
    return kept, first_calls


class Referee:
    """Holds each contender's values against the float64 truth, with eager's as the yardstick.

    Eager comes first. `grads` are the gradients that every contender's outputs are given.
    """

    def __init__(self, case: Case, problem: Problem) -> None:
        self.case, self.problem = case, problem
        self.grads: list[torch.Tensor] = []
        self._truth: dict[str, torch.Tensor] | None = None
        self._eager: dict[str, torch.Tensor] = {}
        self._verified = problem.verify() if problem.verify else None
        if case.phase != "forward" or not self._verified:
            exact = problem.truth()
            if case.phase != "forward":
                with torch.no_grad():
                    self.grads = gradients_of(exact.outputs(), case)
            if not self._verified:
                self._truth = evaluate(exact, case.phase, self.grads)

    def judge(self, role: str, values: dict[str, torch.Tensor]) -> list[Parity]:
        """The rows of one contender."""
        if role == "eager":
            self._eager = values
        if self._verified and role != "peer":
            ours, eager = self._verified
            return ours if role == "ours" else eager
        if self._truth is None:  # a verified model's peer is the first to need it
            self._truth = evaluate(self.problem.truth(), self.case.phase, self.grads)
        factor = parity.PEER_FACTOR if role == "peer" else parity.FACTOR
        return parity.check(values, self._eager, self._truth, factor)


def _left_out(contender: Contender, case: Case, options: Options) -> str:
    if case.device not in contender.devices:
        return f"not for {case.device}"
    if contender.forward_only and case.phase != "forward":
        return "forward only"
    if contender.not_quick and options.quick:
        return contender.not_quick
    if contender.role == "peer" and options.peers and contender.name not in options.peers:
        return "not asked for"
    return ""


def backends_of(ran: Mapping[str, int]) -> str:
    """What dispatch counted, as "cpu", or by op where they differ."""
    forward = {name: count for name, count in ran.items() if "_backward." not in name}
    backends = sorted({name.rpartition(".")[2] for name in forward})
    if len(backends) <= 1:
        return "".join(backends)
    return ", ".join(sorted(forward))


def fill_in(result: CaseResult, samples: cpu_timing.Samples) -> None:
    """Medians, intervals and paired ratios from the samples, into the cells."""
    result.rounds, result.discarded_rounds = samples.rounds, samples.discarded
    ours = result.ours
    assert ours is not None
    own = samples.seconds[ours.name]
    for cell in result.cells:
        if cell.name not in samples.seconds:
            continue
        values = samples.seconds[cell.name]
        low, high = stats.bootstrap_interval(values)
        cell.timing = Timing(
            median=stats.median(values),
            low=low,
            high=high,
            best=min(values),
            samples=values,
            calls_per_sample=samples.calls_per_sample[cell.name],
        )
        if cell is not ours:
            cell.speedup_of_ours = paired_ratio(values, own)
    result.handover_s = samples.handover_s
    result.undisturbed = samples.undisturbed and steady(samples.seconds.values(), own)


def steady(contenders: Iterable[list[float]], ours: list[float]) -> bool:
    """Whether the ratios of every contender agree from round to round.

    The sentinel runs on one core, and sees nothing of what disturbs another.
    """
    for theirs in contenders:
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        if stats.scatter(ratios) > STEADY * stats.median(ratios):
            return False
    return True


def paired_ratio(theirs: list[float], ours: list[float]) -> Ratio:
    """How many times faster ours is, round by round."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    low, high = stats.bootstrap_interval(ratios)
    return Ratio(median=stats.median(ratios), low=low, high=high)


def plan_record(plan: cpu_timing.Plan) -> dict[str, Any]:
    """The plan as numbers for the settings of a result."""
    return {name: float(value) for name, value in asdict(plan).items()}
