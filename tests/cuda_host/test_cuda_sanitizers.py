"""No kernel reads or writes outside its buffers, in global or in shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import harness
import pytest

HERE = Path(__file__).parent
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined")


@pytest.fixture(scope="module")
def environment():
    """The sanitizer's library loaded before Python, which was built without it."""
    if reason := harness.why_not():
        pytest.skip(f"kernels not run on the host: {reason}")
    paths = [
        subprocess.run(
            [str(harness.COMPILER), f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    if not all(os.path.isabs(path) for path in paths):
        pytest.skip("this compiler has no sanitizers")
    options = "detect_leaks=0:detect_stack_use_after_return=0:alloc_dealloc_mismatch=0"
    return {**os.environ, "LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": options}


@pytest.fixture(scope="module")
def library(request, tmp_path_factory, environment):
    folder = harness.build_folder(request, tmp_path_factory)
    return harness.build(folder, (*FLAGS, "-DPATCHGEN_FEWER_INSTANCES"))


def run(library: Path, environment: dict[str, str], *arguments: str):
    command = [sys.executable, str(HERE / "sanitized.py"), str(library), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_every_kernel_stays_within_its_buffers(library, environment):
    done = run(library, environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


def test_a_buffer_that_is_too_small_is_seen(library, environment):
    done = run(library, environment, "provoke")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
