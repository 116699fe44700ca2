"""The gate on real timings: no false alarm on this machine, and a 15 % slower kernel is seen.

Takes minutes: `pytest -m slow tests/test_bench_gate.py`. PATCHGEN_FAST_GATE_TRIES sets how often.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
from click.testing import CliRunner

from patchgen_fast.bench import problems
from patchgen_fast.cli import main

TRIES = int(os.environ.get("PATCHGEN_FAST_GATE_TRIES", "10"))
FEW = ("--suite", "quick", "--op", "attention", "--op", "patch_embed", "--peer", "sdpa",
       "--peer", "unfold + linear", "--quiet")  # fmt: skip


def bench(path):
    done = CliRunner().invoke(main, ["bench", *FEW, "--json", str(path)])
    assert done.exit_code == 0, done.output
    return path


def compare(old, new):
    return CliRunner().invoke(main, ["compare", str(old), str(new)])


def slowed(build, factor):
    """Problems whose contender of ours takes `factor` times as long: it works, then spins."""

    def wrapped(runnable):
        forward = runnable.forward

        def slower():
            # By the thread's own clock: a neighbour that took the core makes nothing slower here.
            start = time.thread_time()
            out = forward()
            end = start + (time.thread_time() - start) * factor
            while time.thread_time() < end:
                pass
            return out

        runnable.forward = slower
        return runnable

    def slow_build(case):
        problem = build(case)
        problem.contenders = [
            replace(c, make=lambda make=c.make: wrapped(make())) if c.role == "ours" else c
            for c in problem.contenders
        ]
        return problem

    return slow_build


@pytest.mark.slow
def test_two_runs_of_the_same_code_agree(tmp_path):
    last = bench(tmp_path / "0.json")
    wrong = []
    for number in range(1, TRIES + 1):
        current = bench(tmp_path / f"{number}.json")
        done = compare(last, current)
        if done.exit_code != 0:
            wrong.append(done.output)
        last = current
    assert not wrong, f"{len(wrong)} of {TRIES}:\n{wrong[0]}"


@pytest.mark.slow
def test_fifteen_percent_slower_is_seen(tmp_path, monkeypatch):
    old = bench(tmp_path / "old.json")
    monkeypatch.setattr(problems, "build", slowed(problems.build, 1.15))
    missed = []
    for number in range(TRIES):
        done = compare(old, bench(tmp_path / f"{number}.json"))
        if done.exit_code != 1:
            missed.append(done.output)
    assert not missed, f"{len(missed)} of {TRIES}:\n{missed[0]}"
