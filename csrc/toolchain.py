"""Finds compilers and compiles single files, for setup.py (which runs this file; not installed)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
USUAL_CUDA = "/usr/local/cuda"
DEFAULT_CUDA_ARCHS = "80;86;89;90a;100a;120a;compute_80;compute_120"


class BuildFailure(Exception):
    """A part that could not be built: `reason` and `remedy` end up in the build record."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}\nRemedy: {remedy}")
        self.reason, self.remedy = reason, remedy


REINSTALL = "then reinstall with: pip install --no-build-isolation --no-deps --force-reinstall ."


def run_quietly(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def extra_flags() -> list[str]:
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def find_cxx() -> list[str]:
    """The C++ compiler as a command, once it is known to compile C++20."""
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    remedy = f"install g++ 11 or later, or clang 14 or later, or point CXX at one, {REINSTALL}"
    if shutil.which(command[0]) is None:
        raise BuildFailure(f"no C++ compiler: {command[0]!r} is not there", remedy)
    probe = "#include <bit>\n#include <cmath>\nstatic_assert(__cplusplus >= 202002L);\n"
    done = subprocess.run(
        [*command, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"],
        input=probe,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        first = (done.stderr.strip().splitlines() or ["it exited with an error"])[0]
        raise BuildFailure(f"the C++ compiler {command[0]!r} cannot compile C++20: {first}", remedy)
    return command


def import_torch_cpp_extension() -> tuple[ModuleType, ModuleType]:
    """torch and its cpp_extension; in pip's isolated build, those of the environment outside.

    pip hides that environment's packages from the build, but its path is still known. Taking its
    torch beats downloading another of several gigabytes, and the result runs on every torch from
    2.10 anyway.
    """
    try:
        import torch
    except ImportError:
        for base in (sys.prefix, sys.base_prefix):
            site.addsitedir(sysconfig.get_paths(vars={"base": base})["purelib"])
        try:
            import torch
        except ImportError as error:
            raise BuildFailure(
                f"torch cannot be imported at build time ({error})",
                f"install torch 2.10 or later first, {REINSTALL}",
            ) from None
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 10):
        raise BuildFailure(
            f"torch is {torch.__version__}; the native operators need 2.10 or later",
            f"upgrade torch, {REINSTALL}",
        )
    from torch.utils import cpp_extension

    put_ninja_on_path()
    return torch, cpp_extension


def put_ninja_on_path() -> None:
    """torch asks the PATH for ninja; a virtual environment that is not activated is not on it."""
    if shutil.which("ninja"):
        return
    try:
        files = importlib.metadata.files("ninja") or []
    except importlib.metadata.PackageNotFoundError:
        return  # torch then compiles one file after the other
    folders = [
        str(Path(str(file.locate())).resolve().parent) for file in files if file.name == "ninja"
    ]
    os.environ["PATH"] = os.pathsep.join([*folders, os.environ.get("PATH", "")])


def find_cuda() -> Path:
    """A CUDA toolkit: a folder with bin/nvcc and include/cuda_runtime.h."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parents[1]))
    candidates.append(USUAL_CUDA)
    for folder in (Path(c) for c in candidates if c):
        if (folder / "bin/nvcc").exists() and (folder / "include/cuda_runtime.h").exists():
            return folder
    raise BuildFailure(
        f"no CUDA toolkit: no nvcc on PATH, in CUDA_HOME or in {USUAL_CUDA}",
        f"install CUDA 12.8 or later, or point CUDA_HOME at it, {REINSTALL}",
    )


def cuda_arch_flags(cuda: Path) -> tuple[list[str], list[str]]:
    """The architectures that this nvcc knows of those asked for, and their -gencode flags."""
    asked = os.environ.get("PATCHGEN_FAST_CUDA_ARCHS") or DEFAULT_CUDA_ARCHS
    listed = run_quietly([str(cuda / "bin/nvcc"), "--list-gpu-arch"]).stdout.split()
    archs, flags = [], []
    for arch in filter(None, re.split(r"[;,\s]+", asked)):
        match = re.fullmatch(r"(compute_)?(\d+)([af]?)", arch)
        if match is None:
            raise BuildFailure(
                f"PATCHGEN_FAST_CUDA_ARCHS: expected 90a, compute_120 or the like, got {arch!r}",
                f"for example PATCHGEN_FAST_CUDA_ARCHS='{DEFAULT_CUDA_ARCHS}'",
            )
        ptx, number, suffix = match.groups()
        if f"compute_{number}" not in listed:
            continue  # an older nvcc: the PTX that stays serves that chip
        archs.append(arch)
        code = "compute" if ptx else "sm"
        flags.append(f"-gencode=arch=compute_{number}{suffix},code={code}_{number}{suffix}")
    if not archs:
        raise BuildFailure(
            f"this nvcc knows none of {asked!r}; it lists {' '.join(listed)}",
            "install CUDA 12.8 or later, or set PATCHGEN_FAST_CUDA_ARCHS",
        )
    return archs, flags


def compression_flags(cuda: Path) -> list[str]:
    """Machine code of many architectures, compressed fivefold as all drivers of CUDA 13 read it;
    an older nvcc's code may meet a driver that cannot.
    """
    text = run_quietly([str(cuda / "bin/nvcc"), "--version"]).stdout
    release = re.search(r"release (\d+)\.", text)
    return ["-compress-mode=size"] if release and int(release[1]) >= 13 else []


def compiler_accepts(cxx: list[str], flags: list[str]) -> bool:
    probe = [*cxx, *flags, "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return run_quietly(probe).returncode == 0


class ObjectCompiler:
    """Compiles C++ files with flags of their own; again only if the file, a header that it
    includes, or the command has changed (depfile and hash lie beside the object)."""

    def __init__(self, cxx: list[str], folder: Path, include_dirs: list[str]) -> None:
        self.cxx, self.folder = cxx, folder
        self.includes = [f"-I{path}" for path in include_dirs]
        folder.mkdir(parents=True, exist_ok=True)

    def command(self, source: Path, flags: list[str]) -> tuple[Path, list[str]]:
        target = self.folder / ("_".join(source.with_suffix(".o").parts[1:]))
        return target, [
            *self.cxx, *CXX_FLAGS, *extra_flags(), *flags, *self.includes,
            "-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target),
        ]  # fmt: skip

    def compile(self, sources: dict[Path, list[str]]) -> list[Path]:
        """Objects of `sources` (file -> flags), in order."""
        jobs = [self.command(source, flags) for source, flags in sources.items()]
        workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda job: self._compile_one(*job), jobs))

    def _compile_one(self, target: Path, command: list[str]) -> Path:
        stamp = target.with_suffix(".cmd")
        digest = hashlib.sha256(shlex.join(command).encode()).hexdigest()
        if self._fresh(target, stamp, digest):
            return target
        target.unlink(missing_ok=True)
        print(shlex.join(command), flush=True)
        done = run_quietly(command)
        print(done.stdout + done.stderr, end="", flush=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise BuildFailure(
                f"{command[-3]} does not compile: {(errors or ['see the build log'])[0]}",
                f"see the log of: PATCHGEN_FAST_BUILD=cpu pip install -v .; {REINSTALL}",
            )
        stamp.write_text(digest)
        return target

    @staticmethod
    def _fresh(target: Path, stamp: Path, digest: str) -> bool:
        depfile = target.with_suffix(".d")
        if not (target.exists() and depfile.exists() and stamp.exists()):
            return False
        if stamp.read_text() != digest:
            return False
        inputs = depfile.read_text().replace("\\\n", " ").partition(":")[2]
        built = target.stat().st_mtime_ns
        paths = [Path(name.replace("\\ ", " ")) for name in re.findall(r"(?:\\ |\S)+", inputs)]
        return all(path.exists() and path.stat().st_mtime_ns <= built for path in paths)


def assert_no_weak_symbols(objects: list[Path]) -> None:
    """A weak symbol (an inline function, a template) compiled with AVX-512 could be the copy that
    the linker keeps for the baseline path too, and stop an old CPU with SIGILL."""
    if shutil.which("nm") is None:
        return
    for path in objects:
        lines = run_quietly(["nm", "-C", str(path)]).stdout.splitlines()
        weak = [line for line in lines if re.search(r" [WVu] ", line)]
        if weak:
            raise BuildFailure(
                f"{path.name} defines weak symbols, e.g. {weak[0].split(maxsplit=2)[-1]}",
                "give the functions of that file internal linkage (static, anonymous namespace) or "
                "mark them always_inline, and keep templates of the standard library out of it",
            )


def pybind11_include() -> str:
    try:
        import pybind11

        return pybind11.get_include()
    except ImportError:
        torch, _ = import_torch_cpp_extension()  # torch carries pybind11's headers
        return str(Path(torch.__file__).parent / "include")
