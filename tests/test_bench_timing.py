"""The timing core's logic, on a clock that the tests move."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from bench_fakes import MS, PLAN, FakeClock

from patchgen_fast.bench import calibrate, stats, timing


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7])
def test_orders_are_balanced(n):
    names = [str(i) for i in range(n)]
    rounds = n if n % 2 == 0 else 2 * n
    orders = list(itertools.islice(timing.balanced_orders(names), rounds))
    assert all(sorted(order) == names for order in orders)
    for place in range(n):
        at_place = Counter(order[place] for order in orders)
        assert set(at_place.values()) == {rounds // n}
    if n > 1:
        followers = Counter(pair for order in orders for pair in itertools.pairwise(order))
        assert len(followers) == n * (n - 1)
        assert len(set(followers.values())) == 1


def test_measures_what_the_clock_says_and_pairs_the_samples():
    clock = FakeClock()
    samples = timing.measure(
        {"slow": clock.taking(3.0), "fast": clock.taking(1.0)}, PLAN, clock=clock
    )
    assert set(samples.seconds) == {"slow", "fast"}
    assert len(samples.seconds["slow"]) == len(samples.seconds["fast"]) == samples.rounds
    assert samples.seconds["slow"] == pytest.approx([3e-3] * samples.rounds)
    assert samples.seconds["fast"] == pytest.approx([1e-3] * samples.rounds)
    assert samples.first_call_s["slow"] == pytest.approx(3e-3)
    assert samples.undisturbed and samples.discarded == 0


def test_short_calls_are_repeated_within_a_sample():
    clock = FakeClock()
    plan = timing.Plan(budget_s=0.01, min_rounds=3, max_rounds=5, warmup_s=0.0, sample_s=0.002)
    samples = timing.measure({"a": clock.taking(0.1)}, plan, clock=clock)
    assert samples.calls_per_sample["a"] == 20
    assert samples.seconds["a"] == pytest.approx([1e-4] * samples.rounds)


def test_rounds_with_a_slow_sentinel_are_thrown_away_whole():
    clock = FakeClock()
    calls = itertools.count()
    # Runs of the sentinel that find the machine busy. It runs in pairs, of which the better counts:
    # five before the rounds (0 to 9), then two a round.
    disturbed = {12, 13, 16, 17, 18, 22}

    def sentinel():
        clock.spend(0.1 * MS * (2.0 if next(calls) in disturbed else 1.0))

    samples = timing.measure(
        {"a": clock.taking(1.0), "b": clock.taking(2.0)}, PLAN, clock=clock, sentinel=sentinel
    )
    # 12 and 13 end the first round, 16 and 17 the second; 18 and 22 are single interrupts
    assert samples.discarded == 2
    assert samples.rounds >= PLAN.min_rounds
    assert samples.undisturbed
    assert max(samples.sentinel_s) < 0.15e-3


@pytest.mark.parametrize("single_thread", [True, False])
def test_a_sample_that_waited_for_the_processor_is_thrown_away(single_thread):
    clock = FakeClock()
    calls = itertools.count()

    def sometimes_preempted():
        waiting = 5 * MS if next(calls) in (5, 8) else 0
        clock.spend(1 * MS, waiting)

    samples = timing.measure(
        {"a": sometimes_preempted}, PLAN, clock=clock, single_thread=single_thread
    )
    assert samples.discarded == (2 if single_thread else 0)
    longest = max(samples.seconds["a"])
    assert longest == pytest.approx(1e-3 if single_thread else 6e-3)


def test_a_machine_that_is_never_quiet_is_reported_and_the_time_worked_is_kept():
    clock = FakeClock()

    def always_waiting():
        clock.spend(1 * MS, 1 * MS)

    samples = timing.measure({"a": always_waiting}, PLAN, clock=clock)
    assert not samples.undisturbed
    assert PLAN.min_rounds <= samples.rounds < samples.discarded
    assert samples.seconds["a"] == pytest.approx([1e-3] * samples.rounds)


@pytest.mark.parametrize("single_thread", [True, False])
def test_several_threads_count_by_the_time_that_passed(single_thread):
    """Their processor times add up to more than what passed, and waiting for one another counts."""
    clock = FakeClock()
    slower = itertools.count(1)

    def sentinel():
        clock.spend(0.1 * MS * next(slower))  # never the same: no round is quiet

    def call():
        clock.spend(1 * MS, 1 * MS)

    samples = timing.measure(
        {"a": call}, PLAN, clock=clock, sentinel=sentinel, single_thread=single_thread
    )
    assert not samples.undisturbed
    assert samples.seconds["a"][0] == pytest.approx(1e-3 if single_thread else 2e-3)


def test_of_a_machine_that_is_never_quiet_the_quietest_rounds_are_kept():
    clock, lengths = FakeClock(), itertools.cycle([9, 9, 2])
    samples = timing.measure(
        {"a": lambda: clock.spend(next(lengths) * MS, 1 * MS)}, PLAN, clock=clock
    )
    assert not samples.undisturbed and samples.rounds >= PLAN.min_rounds
    assert samples.seconds["a"] == pytest.approx([2e-3] * samples.rounds)


@pytest.mark.parametrize("taken, undisturbed", [(0, True), (1, True), (20, False)])
def test_several_threads_are_disturbed_by_what_takes_a_core_from_them(taken, undisturbed):
    clock = FakeClock()

    def call():
        clock.spend(10 * MS, 5 * MS)  # one waits for the other: no disturbance
        clock.taken += taken

    samples = timing.measure({"a": call}, PLAN, clock=clock, single_thread=False)
    assert samples.undisturbed == undisturbed


@pytest.mark.parametrize("cores", [0.05, 0.5])
@pytest.mark.parametrize("single_thread", [True, False])
def test_work_beside_several_threads_disturbs_them(cores, single_thread):
    """Even where it never took a core from them while they were on it."""
    clock = FakeClock()

    def beside():
        clock.spend(1 * MS)
        clock.elsewhere += int(cores * MS)

    samples = timing.measure({"a": beside}, PLAN, clock=clock, single_thread=single_thread)
    assert samples.undisturbed == (single_thread or cores < PLAN.others)


@pytest.mark.parametrize("single_thread", [True, False])
def test_rounds_with_the_cores_apart_are_discarded(single_thread):
    """What a round takes there is left out, and how far apart the cores were is kept."""
    clock, rounds = FakeClock(), itertools.count()
    apart = [False]

    def handover():
        apart[0] = next(rounds) % 3 == 1
        return 190e-9 if apart[0] else 45e-9

    samples = timing.measure(
        {"a": lambda: clock.spend((3 if apart[0] else 2) * MS)},
        PLAN,
        clock=clock,
        handover=handover,
        single_thread=single_thread,
    )
    assert samples.handover_s == (None if single_thread else 45e-9)
    assert (samples.discarded > 0) != single_thread and samples.undisturbed
    assert samples.seconds["a"] == pytest.approx([2e-3] * samples.rounds)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a thread on a core")
def test_a_line_takes_time_from_core_to_core():
    handover = calibrate.make_handover()
    if handover is None:
        pytest.skip("one core alone")
    assert 1e-9 < handover() < 1e-3


def test_the_machine_counts_what_takes_a_core():
    assert timing.SystemClock.preemptions() >= 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what other work takes")
def test_the_machine_says_what_other_work_takes():
    before, wall = timing.SystemClock.others(), timing.SystemClock.wall()
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    taken = timing.SystemClock.others() - before
    assert taken > 0
    assert taken < 2 * (os.cpu_count() or 1) * (timing.SystemClock.wall() - wall)


def test_a_long_call_still_gets_its_rounds():
    clock = FakeClock()
    samples = timing.measure({"a": clock.taking(1000.0)}, PLAN, clock=clock)
    assert samples.rounds == PLAN.min_rounds


def test_a_short_call_stops_at_the_most_rounds():
    clock = FakeClock()
    samples = timing.measure({"a": clock.taking(0.5)}, PLAN, clock=clock)
    assert samples.rounds == PLAN.max_rounds


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="at least one contender"):
        timing.measure({}, PLAN)


def test_bootstrap_interval_holds_the_median_and_is_reproducible():
    values = np.random.default_rng(1).lognormal(size=41).tolist()
    low, high = stats.bootstrap_interval(values)
    assert low < stats.median(values) < high
    assert (low, high) == stats.bootstrap_interval(values)
    wide = stats.bootstrap_interval(values, confidence=0.999)
    assert wide[0] <= low and high <= wide[1]
    assert stats.bootstrap_interval([2.0]) == (2.0, 2.0)


def exact_mann_whitney(a, b):
    """P(U <= u) over all ways to deal the values out; for small samples."""

    def u(first, second):
        return sum((x > y) + 0.5 * (x == y) for x in first for y in second)

    values, seen = a + b, u(a, b)
    deals = [set(d) for d in itertools.combinations(range(len(values)), len(a))]
    hits = 0
    for deal in deals:
        first = [values[i] for i in deal]
        second = [values[i] for i in range(len(values)) if i not in deal]
        hits += u(first, second) <= seen
    return hits / len(deals)


@pytest.mark.parametrize("seed", range(6))
def test_mann_whitney_is_near_the_exact_test(seed):
    random = np.random.default_rng(seed)
    a = random.normal(size=6).tolist()
    b = random.normal(0.3 * seed, size=7).tolist()
    assert stats.mann_whitney_less(a, b) == pytest.approx(exact_mann_whitney(a, b), abs=0.015)


def test_mann_whitney_edges():
    assert stats.mann_whitney_less([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) < 0.01
    assert stats.mann_whitney_less([6, 7, 8, 9, 10], [1, 2, 3, 4, 5]) > 0.99
    assert stats.mann_whitney_less([1.0] * 5, [1.0] * 5) == 1.0
    assert stats.mann_whitney_less([], [1.0]) == 1.0
