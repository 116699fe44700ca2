"""Parity before numbers, visible cells, saving as it goes, going on after an interruption."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest
import torch
from bench_fakes import MS, FakeClock, case, empty_result, options, problem

from patchgen_fast.bench import parity, results, runner, schema, tables
from patchgen_fast.bench.problems.base import Absent, Refused, Runnable

TIMES = {"eager": 4.0, "sdpa": 3.0, "ours": 2.0}


def run_one(tmp_path, build, **changes):
    clock = FakeClock()
    writer = results.ResultWriter(tmp_path / "r.json", empty_result())
    runner.run([case()], writer, options(clock, lambda _: build(clock), **changes))
    stored = results.read(tmp_path / "r.json")
    assert stored.complete
    return stored.cases[0]


def test_a_good_case_has_times_and_paired_ratios(tmp_path):
    found = run_one(tmp_path, lambda clock: problem(clock, TIMES))
    assert found.status == schema.OK
    assert {cell.name: cell.status for cell in found.cells} == dict.fromkeys(TIMES, "ok")
    assert found.ours.timing.median == pytest.approx(2e-3)
    assert found.eager.speedup_of_ours.median == pytest.approx(2.0)
    assert found.best_peer.name == "sdpa"
    assert found.best_peer.speedup_of_ours.median == pytest.approx(1.5)
    assert len(found.ours.timing.samples) == found.rounds >= 5
    # 1e6 flop at 1e9 flop/s take 1 ms, half of what was measured; 1e3 bytes at 1e8 take 10 us
    assert found.cost.limit == "products"
    assert tables.percent_of_limit(found) == pytest.approx(50.0)


def test_rounds_that_disagree_are_a_disturbed_measurement():
    ours = [2.0, 2.0, 2.2, 2.0, 1.9, 2.1]
    drifting = [4.0, 4.1, 4.4, 4.0, 3.9, 4.3]  # with ours: the machine as a whole
    wild = [1.3, 4.2, 6.4, 2.0, 5.1, 9.0]
    assert runner.steady([drifting, ours], ours)
    assert not runner.steady([drifting, wild, ours], ours)


def test_peak_memory_is_that_of_torchs_allocator(tmp_path):
    def build(clock):
        made = problem(clock, TIMES)
        made.contenders[1] = dataclasses.replace(made.contenders[1], own_memory=True)
        return made

    found = run_one(tmp_path, build)
    # 16 floats and their double, in blocks of 64 bytes: what the fake problem's contender holds
    assert found.ours.peak_memory == found.eager.peak_memory >= 2 * 16 * 4
    assert found.cell("sdpa").peak_memory is None


def test_red_parity_of_ours_leaves_no_number_anywhere(tmp_path):
    found = run_one(tmp_path, lambda clock: problem(clock, TIMES, wrong={"ours": 1e-2}))
    assert found.status == schema.RED
    assert "max error" in found.reason
    assert all(cell.timing is None and cell.speedup_of_ours is None for cell in found.cells)
    shown = " ".join(tables.row(found))
    assert "RED" in shown and " ms" not in shown


def test_red_parity_of_a_peer_costs_that_peer_its_number_only(tmp_path):
    found = run_one(tmp_path, lambda clock: problem(clock, TIMES, wrong={"sdpa": 1e-2}))
    assert found.status == schema.OK
    assert found.cell("sdpa").status == schema.RED
    assert found.cell("sdpa").timing is None
    assert found.ours.timing and found.eager.timing
    assert found.best_peer is None


@pytest.mark.parametrize(
    "error, status",
    [
        (Absent("not installed"), "absent"),
        (Refused("no bf16"), "refused"),
        (RuntimeError("boom"), "error"),
    ],
)
def test_a_peer_that_cannot_run_stays_visible(tmp_path, error, status):
    def fails():
        raise error

    found = run_one(tmp_path, lambda clock: problem(clock, TIMES, make={"sdpa": fails}))
    cell = found.cell("sdpa")
    assert (cell.status, cell.timing) == (status, None)
    assert str(error) in cell.reason
    assert found.status == schema.OK
    document = empty_result()
    document.cases = [found]
    assert any("sdpa" in line and str(error) in line for line in tables.missing_peers(document))


def test_ours_refusing_is_the_state_of_the_case(tmp_path):
    def fails():
        raise Refused("no kernel")

    found = run_one(tmp_path, lambda clock: problem(clock, TIMES, make={"ours": fails}))
    assert (found.status, found.reason) == ("refused", "no kernel")
    assert all(cell.timing is None for cell in found.cells)


def test_eager_failing_is_an_error_of_the_case_and_the_run_goes_on(tmp_path):
    def fails():
        raise RuntimeError("boom")

    found = run_one(tmp_path, lambda clock: problem(clock, TIMES, make={"eager": fails}))
    assert (found.status, found.reason) == ("error", "RuntimeError: boom")


def test_peers_can_be_chosen_and_the_others_say_so(tmp_path):
    found = run_one(tmp_path, lambda clock: problem(clock, {"x": 1.0, **TIMES}), peers=("sdpa",))
    assert found.cell("x").status == "skipped"
    assert found.cell("sdpa").timing


def test_resume_measures_only_what_is_missing(tmp_path):
    clock, built = FakeClock(), []

    def build(wanted):
        built.append(wanted.name)
        return problem(clock, TIMES)

    path = tmp_path / "r.json"
    first, second = case("first"), case("second")
    runner.run([first], results.ResultWriter(path, empty_result()), options(clock, build))
    earlier = results.resumable(path, empty_result().settings, "c0ffee")
    runner.run([first, second], results.ResultWriter(path, earlier), options(clock, build))
    assert built == ["first", "second"]
    assert [item.case for item in results.read(path).cases] == ["first", "second"]


def test_resume_refuses_another_commit_or_plan(tmp_path):
    path = tmp_path / "r.json"
    results.ResultWriter(path, empty_result())
    settings = empty_result().settings
    with pytest.raises(results.ResultError, match="commit"):
        results.resumable(path, settings, "other")
    settings.plan = {"budget_s": 99.0}
    with pytest.raises(results.ResultError, match="timing settings"):
        results.resumable(path, settings, "c0ffee")


CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.path.insert(0, {tests!r})
from bench_fakes import FakeClock, case, empty_result, options, problem
from patchgen_fast.bench import results, runner
clock = FakeClock()
def build(wanted):
    if wanted.name == "stuck":
        print("stuck", flush=True)
        time.sleep(600)
    return problem(clock, {times!r})
writer = results.ResultWriter({path!r}, empty_result())
runner.run([case("one"), case("two"), case("stuck")], writer, options(clock, build))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_loses_only_the_case_that_was_running(tmp_path, how):
    path = tmp_path / "r.json"
    tests = Path(__file__).parent
    code = CHILD.format(tests=str(tests), times=TIMES, path=str(path))
    environment = {**os.environ, "PYTHONPATH": str(tests.parent)}
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    try:
        assert child.stdout.readline() == b"stuck\n"
        child.send_signal(how)
        child.wait(timeout=60)
    finally:
        child.kill()
        child.stdout.close()
    stored = results.read(path)
    assert [item.case for item in stored.cases] == ["one", "two"]
    assert not stored.complete
    assert stored.cases[0].ours.timing.samples


def test_results_survive_the_round_trip(tmp_path):
    path = tmp_path / "folder" / "r.json"
    found = run_one(tmp_path, lambda clock: problem(clock, TIMES))
    document = empty_result()
    document.cases = [found]
    results.write_atomically(path, results.encode(document))
    assert results.read(path) == document
    assert [item.name for item in path.parent.iterdir()] == ["r.json"]  # no temporary file left


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_bytes(b"old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "replace", full)
    with pytest.raises(results.ResultError, match="No space left"):
        results.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[]", "not valid JSON"),
        ('{"kind": "other"}', "expected a result of"),
        ('{"kind": "patchgen_fast.bench", "schema_version": 0}', "an older"),
        ('{"kind": "patchgen_fast.bench", "schema_version": 99}', "a newer"),
        (
            f'{{"kind": "patchgen_fast.bench", "schema_version": {schema.SCHEMA_VERSION}}}',
            "does not fit the schema",
        ),
    ],
)
def test_unreadable_results_say_why_and_are_not_overwritten(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(results.ResultError, match=message):
        results.read(path)
    with pytest.raises(results.ResultError, match="not overwriting"):
        results.refuse_foreign(path)
    assert path.read_text() == text


def test_the_parity_rule():
    truth = torch.linspace(-1, 1, 64, dtype=torch.float64)
    eager = truth.to(torch.bfloat16)
    eps = torch.finfo(torch.bfloat16).eps
    assert parity.compare_one("out", eager, eager, truth).ok
    yard = float((eager.double() - truth).abs().max())
    worse = eager.clone()
    worse[0] += 2 * yard + 4 * eps  # beyond 2 x eager's + 2 eps max|truth|
    row = parity.compare_one("out", worse, eager, truth)
    assert not row.ok and row.max_error > row.max_allowed
    # the largest error is allowed, its being everywhere is not
    spread = (truth + 1.9 * eps).to(torch.bfloat16)
    row = parity.compare_one("out", spread, eager, truth)
    assert row.max_error <= row.max_allowed and row.mean_error > row.mean_allowed and not row.ok


def test_parity_is_red_for_nan_shape_dtype_and_missing_outputs():
    truth = torch.ones(4, dtype=torch.float64)
    eager = torch.ones(4)
    broken = torch.tensor([1.0, 1.0, 1.0, float("nan")])
    assert "not finite" in parity.compare_one("out", broken, eager, truth).reason
    assert "shape" in parity.compare_one("out", torch.ones(5), eager, truth).reason
    assert "dtype" in parity.compare_one("out", eager.double(), eager, truth).reason
    rows = parity.check({}, {"out": eager}, {"out": truth})
    assert [row.ok for row in rows] == [False]
    msgspec.json.encode(rows)


def test_outputs_that_a_contender_leaves_unwritten_are_seen(tmp_path):
    clock = FakeClock()

    def unwritten():
        def forward():
            clock.spend(MS)
            return torch.full((16,), float("nan"))

        return Runnable(forward)

    found = run_one(tmp_path, lambda _: problem(clock, TIMES, make={"ours": unwritten}))
    assert found.status == schema.RED and "not finite" in found.reason
