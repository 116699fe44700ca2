"""The CPU kernels under other compilers and for other machines, where such compilers are installed.

They must compile without a warning; `.ci/aarch64-check` also runs them, emulated.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402

ZIG = [sys.executable, "-m", "ziglang", "c++"]  # a clang whose wheel brings macOS' headers
COMPILERS = {
    "g++ for aarch64": (["aarch64-linux-gnu-g++"], "Debian: g++-aarch64-linux-gnu"),
    "clang": (["clang++"], "Debian: clang"),
    "clang for macOS on arm64": ([*ZIG, "-target", "aarch64-macos"], "pip install ziglang"),
    "clang for macOS on x86_64": ([*ZIG, "-target", "x86_64-macos"], "pip install ziglang"),
}
# All that is compiled without torch's or Python's headers, and for every CPU.
SOURCES = [
    *("cpu/kernels_baseline", "cpu/kernels", "cpu/isa", "counters", "native/calibrate_baseline"),
    *("native/calibration", "native/handover", "native/machine"),
]
# And for one kind of x86.
X86_SOURCES = {
    "cpu/kernels_avx2": "-march=haswell",
    "cpu/kernels_avx512_bf16": "-march=cooperlake",
}
FLAGS = [*toolchain.CXX_FLAGS, "-O0", "-Werror", "-DPATCHGEN_FAST_HAVE_BASELINE=1"]


@pytest.fixture(params=COMPILERS)
def compiler(request: pytest.FixtureRequest) -> list[str]:
    command, remedy = COMPILERS[request.param]
    there = (
        importlib.util.find_spec("ziglang") if "ziglang" in command else shutil.which(command[0])
    )
    if there is None:
        pytest.skip(f"no {request.param} ({remedy})")
    return command


def assert_compiles(compiler: list[str], source: str, target: Path, *flags: str) -> None:
    command = [*compiler, *FLAGS, *flags, f"-I{ROOT / 'csrc'}"]
    # Zig's front end has no -fsyntax-only
    command += ["-c", "-o", str(target)] if "ziglang" in compiler else ["-fsyntax-only"]
    done = toolchain.run_quietly([*command, str(ROOT / f"csrc/{source}.cpp")])
    assert done.returncode == 0, f"{source}: {done.stderr[:3000]}"


@pytest.mark.parametrize("source", SOURCES)
def test_it_compiles_for_every_cpu(compiler: list[str], source: str, tmp_path: Path) -> None:
    assert_compiles(compiler, source, tmp_path / "object.o")


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang (Debian: clang)")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="an x86 matter")
@pytest.mark.parametrize("source", X86_SOURCES)
def test_clang_compiles_it_for_newer_x86(source: str, tmp_path: Path) -> None:
    assert_compiles(["clang++"], source, tmp_path / "object.o", X86_SOURCES[source])
