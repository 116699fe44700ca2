"""Each instruction set of this build and CPU, forced in a process of its own, runs the
representative part of the ops' tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from patchgen_fast import _native

ROOT = Path(__file__).parents[1]
INFO = _native.info_module()
NAMES = ("avx512_bf16", "avx512", "avx2", "baseline")


def unsupported(name: str) -> str | None:
    """Why this instruction set can't be forced here."""
    if INFO is None or not _native.load().loaded:
        return f"cpu: the native operators are {_native.status()}"
    built = {found["name"]: found["supported"] for found in INFO.instruction_sets()}
    if name not in built:
        return f"{name}: not part of this build"
    return None if built[name] else f"{name}: this CPU lacks it"


def forced(name: str, code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PATCHGEN_FAST_CPU_ISA": name, "PYTHONPATH": path}
    environment.pop("PYTEST_ADDOPTS", None)
    for variable in [name for name in environment if name.startswith("PYTEST_XDIST")]:
        del environment[variable]
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("name", NAMES)
def test_ops_under_each_instruction_set(name: str) -> None:
    reason = unsupported(name)
    if reason is not None:
        pytest.skip(reason)
    run = textwrap.dedent(
        f"""
        import sys, pytest
        from patchgen_fast import _native

        chosen = _native.info_module().chosen_isa()
        assert chosen == {name!r}, chosen
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        ops = ("attention", "linear", "patch_embed", "qk_norm_rope")
        tests = [f"tests/test_{{op}}.py" for op in ops]
        sys.exit(pytest.main([*options, "-m", "representative", "-k", "[cpu-", *tests]))
        """
    )
    done = forced(name, run)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 37, done.stdout[-2000:]


def test_an_instruction_set_that_is_not_there_is_an_error_not_a_fallback() -> None:
    if unsupported("baseline") is not None:
        pytest.skip(unsupported("baseline"))
    done = forced("avx9000", "from patchgen_fast import _native; _native.load()")
    assert done.returncode != 0
    assert "PATCHGEN_FAST_CPU_ISA" in done.stderr and "avx9000" in done.stderr
