"""A clock and a problem that the benchmark's tests drive by hand: none depends on a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from patchgen_fast.bench import results, runner, timing
from patchgen_fast.bench.cases import Case
from patchgen_fast.bench.problems.base import Contender, Problem, Runnable
from patchgen_fast.bench.schema import (
    Calibration,
    Cost,
    Environment,
    ResultFile,
    Settings,
)

MS = 1_000_000  # nanoseconds


class FakeClock:
    """Time that passes only when `spend` is called."""

    def __init__(self) -> None:
        self.now = 0
        self.worked = 0
        self.taken = 0
        self.elsewhere = 0

    def wall(self) -> int:
        return self.now

    def cpu(self) -> int:
        return self.worked

    def others(self) -> int:
        return self.elsewhere

    def preemptions(self) -> int:
        return self.taken

    def spend(self, nanoseconds: float, waiting: float = 0.0) -> None:
        """Let time pass: on the processor, and waiting for it."""
        self.now += int(nanoseconds + waiting)
        self.worked += int(nanoseconds)

    def taking(self, milliseconds: float) -> Callable[[], None]:
        """A call of this length."""
        return lambda: self.spend(milliseconds * MS)


PLAN = timing.Plan(budget_s=0.05, min_rounds=5, max_rounds=12, warmup_s=0.0, sample_s=0.0)


def case(name: str = "tiny", **changes: object) -> Case:
    return Case("attention", name, "op", {"B": 1, "H": 1, "N": 4, "D": 8}, **changes)  # type: ignore[arg-type]


def problem(
    clock: FakeClock,
    times: dict[str, float],
    wrong: dict[str, float] | None = None,
    make: dict[str, Callable[[], Runnable]] | None = None,
) -> Problem:
    """Contenders that double a vector, each in its time (ms); `wrong` adds an error to one."""
    source = torch.linspace(0.1, 1.0, 16)

    def contender(name: str) -> Contender:
        def forward() -> torch.Tensor:
            clock.spend(times[name] * MS)
            return source * 2 + (wrong or {}).get(name, 0.0)

        role = name if name in ("eager", "ours") else "peer"
        maker = (make or {}).get(name, lambda: Runnable(forward))
        return Contender(name, role, maker)

    return Problem(
        [contender(name) for name in times],
        lambda: Runnable(lambda: source.double() * 2),
        Cost(flops=1e6, bytes=1e3),
        items=4,
    )


def empty_result() -> ResultFile:
    return ResultFile(
        started=results.now(),
        updated=results.now(),
        settings=Settings(suite="quick", plan=runner.plan_record(PLAN)),
        environment=Environment(
            commit="c0ffee",
            dirty=False,
            version="0",
            python="3",
            platform="test",
            cpu="test",
            cores=1,
            isa="",
            native="",
            packages={"torch": str(torch.__version__)},
            variables={},
        ),
    )


def peaks(device: str, threads: int) -> Calibration:
    return Calibration(
        device=device,
        threads=threads,
        source="test",
        fp32_flops=1e9,
        bf16_flops=2e9,
        bandwidth={"L2": 1e8, "DRAM": 1e7},
        cache_bytes={"L2": 1 << 20},
    )


def options(
    clock: FakeClock, build: Callable[[Case], Problem], **changes: object
) -> runner.Options:
    return runner.Options(
        plan=PLAN,
        clock=clock,
        sentinel=clock.taking(0.1),
        build=build,
        calibrate=peaks,
        **changes,  # type: ignore[arg-type]
    )
