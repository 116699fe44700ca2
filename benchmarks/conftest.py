"""pytest-benchmark suites over the cases and the timing core of `patchgen-fast bench`.

    pytest benchmarks --benchmark-json=out.json
    pytest benchmarks -k "attention and vit_b and float32" --rounds quick

A case is measured once, all contenders interleaved, after its parity check; each test then hands
the samples of one contender to pytest-benchmark. A red parity check fails, a refusal is skipped.
"""

from __future__ import annotations

import pytest

from patchgen_fast.bench import calibrate, environment, results, runner, timing
from patchgen_fast.bench.cases import Case, select
from patchgen_fast.bench.schema import (
    ERROR,
    OK,
    RED,
    CaseResult,
    Cell,
    ResultFile,
    Settings,
)

CONTENDERS = ("eager", "best peer", "ours")


class Replay:
    """A timer for pytest-benchmark that shows recorded durations instead of the clock's."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def through(self, samples: list[float]):
        """A function that lets the next sample's time pass, for as many calls as there are."""
        remaining = iter(samples)

        def target() -> None:
            self.now += next(remaining)

        return target


replay = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", choices=["full", "quick"], default="full", help="how long to time")


def parametrize(suite: str):
    """Tests of every case of a suite on the CPU, a test a contender."""
    chosen = select(suite)

    def decorate(function):
        function = pytest.mark.parametrize("contender", CONTENDERS)(function)
        function = pytest.mark.parametrize("case", chosen, ids=lambda case: case.id)(function)
        return pytest.mark.benchmark(timer=replay, warmup=False)(function)

    return decorate


class InMemory:
    """The part of a result writer that a case needs, without a file."""

    def __init__(self) -> None:
        now = results.now()
        self.result = ResultFile(
            started=now,
            updated=now,
            settings=Settings(suite="pytest"),
            environment=environment.collect(),
        )

    def save(self) -> None:
        pass


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest):
    """case -> its result, measured when first asked for."""
    quick = request.config.getoption("--rounds") == "quick"
    options = runner.Options(plan=timing.QUICK if quick else timing.FULL, quick=quick)
    writer, sentinel, known = InMemory(), calibrate.make_sentinel(), {}

    def measure(case: Case) -> CaseResult:
        if case.id not in known:
            known[case.id] = runner.run_case(case, writer, options, sentinel)
        return known[case.id]

    return measure


def hand_over(benchmark, result: CaseResult, contender: str) -> None:
    """Give one contender's samples to pytest-benchmark, or say why there are none."""
    if result.status in (RED, ERROR):
        pytest.fail(result.reason, pytrace=False)
    if result.status != OK:
        pytest.skip(f"{result.status}: {result.reason}")
    cell: Cell | None = {
        "eager": result.eager,
        "best peer": result.best_peer,
        "ours": result.ours,
    }[contender]
    if cell is None or cell.timing is None:
        reasons = {f"{c.name} {c.status}: {c.reason}" for c in result.cells if not c.timing}
        pytest.skip("; ".join(sorted(reasons)) or "no other peer")
    benchmark.group = result.id
    benchmark.extra_info.update(
        contender=cell.name,
        shape=result.shape,
        backend=cell.backend,
        calls_per_sample=cell.timing.calls_per_sample,
        undisturbed=result.undisturbed,
    )
    if cell.speedup_of_ours:
        benchmark.extra_info["speedup_of_ours"] = cell.speedup_of_ours.median
    samples = cell.timing.samples
    benchmark.pedantic(replay.through(samples), rounds=len(samples), iterations=1)
