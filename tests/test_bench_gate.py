"""The gate on real timings: no false alarm on this machine, and a 15 % slower kernel is seen.

Whole runs of the quick suite by the commands that users type, in turn as they are and with the
attention kernel slowed. Takes half an hour on a quiet machine: `pytest -m slow
tests/test_bench_gate.py`. PATCHGEN_FAST_GATE_TRIES sets how often; a folder named by
PATCHGEN_FAST_GATE_FOLDER keeps the runs, and runs that it holds are not made again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRIES = int(os.environ.get("PATCHGEN_FAST_GATE_TRIES", "10"))
ROOT = Path(__file__).parents[1]
AS_IT_IS = ("-m", "patchgen_fast")
SLOWED = (str(ROOT / "tests" / "slowed.py"), "attention", "1.15")


def patchgen_fast(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Makes a run of this name, unless the folder holds it; its result file."""
    kept = os.environ.get("PATCHGEN_FAST_GATE_FOLDER")
    folder = Path(kept).absolute() if kept else tmp_path_factory.mktemp("gate")

    def make(name: str, program: tuple[str, ...] = AS_IT_IS) -> Path:
        path = folder / f"{name}.json"
        if not (path.exists() and json.loads(path.read_text())["complete"]):
            done = patchgen_fast(
                *program, "bench", "--suite", "quick", "--json", path, "--resume", "--quiet"
            )
            assert done.returncode == 0, done.stderr
        return path

    return make


# Of the module's scope, so that both kinds of run alternate: both see the same kinds of noise.
@pytest.fixture(scope="module", params=range(1, TRIES + 1))
def number(request):
    return request.param


@pytest.mark.slow
def test_two_runs_of_the_same_code_agree(run, number):
    done = patchgen_fast(*AS_IT_IS, "compare", run(f"{number - 1}"), run(f"{number}"))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_kernel_slower_by_fifteen_percent_is_seen(run, number):
    slow = run(f"{number}-slowed", SLOWED)
    done = patchgen_fast(*AS_IT_IS, "compare", run(f"{number}"), slow)
    assert done.returncode == 1, done.stdout
