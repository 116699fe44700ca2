"""The gate: what counts as slower, and what does not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from bench_fakes import FakeClock, case, empty_result, options, problem

from patchgen_fast.bench import compare, results, runner, schema


def measured(tmp_path, seed=0, noise=0.02, **times):
    """A result whose samples scatter around these times (ms)."""
    times = {"eager": 4.0, "sdpa": 3.0, "ours": 2.0, **times}
    clock = FakeClock()
    writer = results.ResultWriter(tmp_path / "r.json", empty_result())
    runner.run([case()], writer, options(clock, lambda _: problem(clock, times)))
    found = writer.result.cases[0]
    random = np.random.default_rng(seed)
    drift = 1 + 0.3 * random.random(12)  # of the machine: shared by all contenders of a round
    for cell in found.cells:
        own = 1 + noise * random.standard_normal(12)
        cell.timing.samples = [cell.timing.median * d * o for d, o in zip(drift, own, strict=True)]
    return writer.result


def verdict(old, new, **gate):
    found = compare.compare(old, new, compare.Gate(**gate))
    return found.changes[0].verdict, found.exit_code


def test_the_same_is_the_same(tmp_path):
    old, new = measured(tmp_path), measured(tmp_path)
    assert verdict(old, new) == ("same", 0)


@pytest.mark.parametrize("seed", range(10))
def test_noise_is_not_a_regression(tmp_path, seed):
    old, new = measured(tmp_path, seed, 0.04), measured(tmp_path, seed + 100, 0.04)
    assert verdict(old, new)[1] == 0


def test_fifteen_percent_slower_is_a_regression(tmp_path):
    old, new = measured(tmp_path), measured(tmp_path, ours=2.3)
    assert verdict(old, new) == ("slower", 1)
    assert verdict(new, old) == ("faster", 0)


def test_a_whole_machine_slower_is_not_a_regression_but_is_mentioned(tmp_path):
    old = measured(tmp_path)
    new = measured(tmp_path, eager=8.0, sdpa=6.0, ours=4.0)
    found = compare.compare(old, new)
    assert (found.changes[0].verdict, found.exit_code) == ("same", 0)
    assert "time up 100%" in found.changes[0].notes


def test_one_faster_peer_is_not_a_regression_of_ours(tmp_path):
    old, new = measured(tmp_path), measured(tmp_path, sdpa=2.4)
    assert verdict(old, new) == ("same", 0)


def test_both_thresholds_must_be_passed(tmp_path):
    old, new = measured(tmp_path), measured(tmp_path, ours=2.3)
    assert verdict(old, new, relative=0.2) == ("same", 0)
    assert verdict(old, new, absolute=0.5) == ("same", 0)


def test_what_lies_within_the_scatter_of_rounds_is_no_change(tmp_path):
    """Of many rounds, the test alone would call it one."""
    old, new = measured(tmp_path), measured(tmp_path)
    ratios = 1.0 + 0.15 * np.random.default_rng(0).standard_normal(50)
    for result, shift in ((old, 1.0), (new, 1.12)):
        for cell in result.cases[0].cells:
            own = cell.role == "ours"
            cell.timing.samples = [1.0] * 50 if own else (ratios / shift).tolist()
    assert verdict(old, new) == ("same", 0)
    assert verdict(old, new, scatters=0.0) == ("slower", 1)
    notes = compare.compare(old, new).changes[0].notes
    assert any(note.startswith("scatter hides changes under ") for note in notes)


@pytest.mark.parametrize("handovers, moved", [((40e-9, 190e-9), True), ((40e-9, 55e-9), False)])
def test_cores_that_lie_apart_in_one_run_alone_have_no_verdict(tmp_path, handovers, moved):
    results = measured(tmp_path), measured(tmp_path, ours=2.6)
    for result, handover in zip(results, handovers, strict=True):
        result.cases[0].handover_s = handover
    assert verdict(*results) == (("disturbed", 0) if moved else ("slower", 1))
    notes = compare.compare(*results).changes[0].notes
    assert ("from core to core in 40 ns before, 190 ns now" in notes) == moved
    results[0].cases[0].handover_s = None  # of a version that did not measure it
    assert verdict(*results) == ("slower", 1)


@pytest.mark.parametrize("which", [0, 1])
def test_several_threads_that_were_disturbed_have_no_verdict(tmp_path, which):
    results = measured(tmp_path), measured(tmp_path, ours=2.6)
    for result in results:
        result.cases[0].threads = 2
    assert verdict(*results) == ("slower", 1)
    results[which].cases[0].undisturbed = False
    assert verdict(*results) == ("disturbed", 0)
    assert "1 too disturbed to judge" in compare.summary(compare.compare(*results))
    for result in results:
        result.cases[0].threads = 1  # one thread's samples count by the time that it worked
    assert verdict(*results) == ("slower", 1)


def test_too_few_samples_prove_nothing(tmp_path):
    old, new = measured(tmp_path), measured(tmp_path, ours=2.3)
    for result in (old, new):
        for cell in result.cases[0].cells:
            cell.timing.samples = cell.timing.samples[:3]
    assert verdict(old, new) == ("same", 0)


def test_red_parity_wins_over_everything(tmp_path):
    old, new = measured(tmp_path), measured(tmp_path)
    new.cases[0].status = schema.RED
    assert verdict(old, new) == ("parity", 3)


def test_a_case_that_broke_is_a_regression(tmp_path):
    old, new = measured(tmp_path), measured(tmp_path)
    new.cases[0].status, new.cases[0].reason = "error", "RuntimeError: boom"
    assert verdict(old, new) == ("lost", 1)
    assert verdict(new, old)[1] == 0


def test_new_and_vanished_cases_are_listed(tmp_path):
    old, new = measured(tmp_path), measured(tmp_path)
    new.cases[0].id = "other"
    new.complete = True
    found = compare.compare(old, new)
    assert sorted(change.verdict for change in found.changes) == ["new", "no number"]
    assert found.exit_code == 0


def test_another_machine_is_warned_of(tmp_path):
    old, new = measured(tmp_path), copy.deepcopy(measured(tmp_path))
    new.environment.cpu = "another"
    assert any("other processor" in line for line in compare.compare(old, new).warnings)


def test_markdown_has_the_hidden_marker_and_escapes(tmp_path):
    old, new = measured(tmp_path), measured(tmp_path, ours=2.3)
    new.cases[0].case = "a|b<script>"
    text = compare.markdown(compare.compare(old, new))
    assert text.startswith(compare.MARKER)
    assert "1 slower" in text
    assert "a\\|b&lt;script>" in text and "<script>" not in text
