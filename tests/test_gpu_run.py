"""The script for a lent GPU, rehearsed: steps, their ends, and what is on disk at every moment."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu" / "run.py"


def load():
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_run"] = module
    spec.loader.exec_module(module)
    return module


gpu_run = load()


def step(code: str, seconds: float = 60, **options) -> gpu_run.Step:
    command = (sys.executable, "-c", code)
    return gpu_run.Step("a step", command, seconds, least=0, rehearsal=command, **options)


def outcome_of(tmp_path, step, minutes=1.0, rehearse=False):
    outcomes = []
    gpu_run.go_through([step], minutes, rehearse, tmp_path / "run.log", outcomes.append)
    return outcomes[0]


def test_a_step_passes_and_its_output_is_kept(tmp_path):
    assert outcome_of(tmp_path, step("print('hello')")).status == "passed"
    assert "hello" in (tmp_path / "run.log").read_text()


def test_a_failing_step_is_red(tmp_path):
    outcome = outcome_of(tmp_path, step("raise SystemExit(3)"))
    assert (outcome.status, outcome.detail, outcome.red) == ("failed", "exit 3", True)


def test_a_step_that_hangs_ends_with_all_its_children(tmp_path):
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEPER!r}])"
    outcome = outcome_of(tmp_path, step(child, seconds=2))
    assert outcome.status == "timeout" and outcome.seconds < 30
    pid = int((tmp_path / "run.log").read_text().split()[-1])
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} outlived its step")


SLEEPER = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def test_an_absent_program_and_a_spent_time_are_said(tmp_path):
    absent = outcome_of(tmp_path, step("", needs="no-such-profiler"))
    assert absent.status == "absent" and "no-such-profiler" in absent.detail
    assert (
        outcome_of(tmp_path, step("", needs="no-such-profiler"), rehearse=True).status == "passed"
    )
    assert outcome_of(tmp_path, step(""), minutes=0, rehearse=True).status == "skipped"


def test_a_rehearsal_of_the_build_and_the_kernels_tests(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--rehearse"]
    command += ["--step", "build", "--step", "kernels right"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + (tmp_path / "run.log").read_text()
    written = json.loads((tmp_path / "steps.json").read_text())
    assert [s["status"] for s in written["steps"]] == ["passed", "passed"]
    assert written["machine"]["commit"] and written["machine"]["python"]


def test_every_step_has_a_rehearsal_and_ten_minutes_can_begin_all(tmp_path):
    known = gpu_run.steps(tmp_path)
    assert all(step.rehearsal and step.least <= step.seconds for step in known)
    assert sum(step.least for step in known) <= 600


def test_an_unknown_step_is_a_usage_error(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--step", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "expected --step to be one of build" in done.stderr


def test_killed_it_leaves_what_was_done(tmp_path):
    # The first step is over when the second one's heading is in the log.
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--rehearse"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    log = tmp_path / "run.log"
    for _ in range(600):
        if log.exists() and "== kernels right" in log.read_text():
            break
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    written = json.loads((tmp_path / "steps.json").read_text())
    assert written["steps"][0]["name"] == "build" and written["steps"][0]["status"] == "passed"
