"""Loads the native operators, and says why not.

`_kernels.so` (the operators, torch's stable ABI) and `_native_info` (a pybind11 module that touches
no tensor) are built by setup.py, which leaves `build_record.json` beside them. Nothing here raises
because a part is missing: the reference serves, and `status()` names the reason and the remedy.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "_kernels.so"
BUILD_RECORD = PACKAGE / "build_record.json"
BUILD_FROM_SOURCE = (
    "build it with: python setup.py build_ext --inplace (in the source tree), "
    "or reinstall with: pip install --no-build-isolation --no-deps --force-reinstall ."
)

_lock = threading.Lock()
_status: Status | None = None


@dataclass(frozen=True)
class Status:
    """Whether the native operators are loaded; if not, why, and what to do."""

    loaded: bool
    reason: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        return "loaded" if self.loaded else f"not loaded: {self.reason}. Remedy: {self.remedy}"


@functools.cache
def build_record() -> dict[str, Any]:
    """What setup.py built here: a dict as in its `_write_record`; empty if nothing ever was."""
    try:
        record = json.loads(BUILD_RECORD.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def build_failure(part: str) -> Status:
    """Why `part` ("operators", "cuda", "info") was not built, by the build record."""
    record = build_record()
    failures = record.get("failures", {})
    found = failures.get(part) or failures.get("operators")
    if found:
        return Status(False, found["reason"], found["remedy"])
    if not record:
        return Status(False, "the native part has not been built", BUILD_FROM_SOURCE)
    how = f"PATCHGEN_FAST_BUILD={record.get('requested')}"
    return Status(False, f"{part} was not part of this build ({how})", BUILD_FROM_SOURCE)


def load() -> Status:
    """Registers the native operators with torch, once; says whether they are there.

    Raises ValueError if PATCHGEN_FAST_CPU_ISA names an instruction set that this CPU or this build
    lacks: an explicit request does not fall back silently.
    """
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _check_isa_override()
                _status = _load()
    return _status


def status() -> Status:
    """As `load`, for reports: a wrong PATCHGEN_FAST_CPU_ISA is a reason, not an exception."""
    try:
        return load()
    except ValueError as error:
        return Status(False, str(error), "unset PATCHGEN_FAST_CPU_ISA or set one of those named")


def _load() -> Status:
    if not LIBRARY.exists():
        return build_failure("operators")
    import torch

    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        reason = f"{LIBRARY.name} cannot be loaded into torch {torch.__version__}: {error}"
        version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if version < (2, 10):
            return Status(False, reason, "upgrade torch to 2.10 or later")
        return Status(False, reason, BUILD_FROM_SOURCE)
    return Status(True)


def _check_isa_override() -> None:
    module = info_module()
    if module is not None:
        module.chosen_isa()


@functools.cache
def info_module() -> ModuleType | None:
    """The pybind11 module with the facts of build and CPU; None if it was not built."""
    try:
        return importlib.import_module("patchgen_fast._native_info")
    except ImportError:
        return None


@functools.cache
def is_baseline() -> bool:
    """Whether the kernels in use are those for any CPU. ValueError for a wrong override."""
    module = info_module()
    return module is None or module.chosen_isa() == "baseline"


def unavailable_reason(backend: str) -> str | None:
    """Why no kernel of the native `backend` ("cpu" or "cuda") can run here; None if some can.

    Loads the library, so that its kernels are registered afterwards. ValueError as `load`.
    """
    state = load()
    if not state.loaded:
        return f"the native operators are {state}"
    if backend == "cuda" and not has_cuda():
        return f"the native operators were built without CUDA: {build_failure('cuda').reason}"
    if backend == "cuda" and not finds_stream():
        return "this torch has no CUDA, so no stream to launch on"
    return None


def call_counts() -> dict[str, int]:
    """Calls of every native kernel so far, as {"attention.cpu": 12}; empty if none are loaded."""
    if _status is None or not _status.loaded:
        return {}
    counts: dict[str, int] = {}
    kernels = library()
    for index in itertools.count():  # two counters may share a name: their counts are added up
        name = kernels.patchgen_fast_counter_name(index)
        if name is None:
            return counts
        counts[name.decode()] = kernels.patchgen_fast_call_count(name)
    raise AssertionError("unreachable")


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded operators for ctypes. RuntimeError if they are not loaded."""
    state = load()
    if not state.loaded:
        raise RuntimeError(f"the native operators are {state}")
    kernels = ctypes.CDLL(str(LIBRARY))
    kernels.patchgen_fast_counter_name.argtypes = [ctypes.c_int64]
    kernels.patchgen_fast_counter_name.restype = ctypes.c_char_p
    kernels.patchgen_fast_call_count.argtypes = [ctypes.c_char_p]
    kernels.patchgen_fast_call_count.restype = ctypes.c_int64
    kernels.patchgen_fast_empty_cache.argtypes = []
    kernels.patchgen_fast_empty_cache.restype = None
    kernels.patchgen_fast_set_kept_limit.argtypes = [ctypes.c_size_t]
    kernels.patchgen_fast_set_kept_limit.restype = ctypes.c_size_t
    kernels.patchgen_fast_kept_bytes.argtypes = []
    kernels.patchgen_fast_kept_bytes.restype = ctypes.c_size_t
    return kernels


def cuda_kernels(device: int) -> list[dict[str, Any]]:
    """What the CUDA driver says of each CUDA kernel on that GPU; empty where there is no such GPU
    or no CUDA kernel.

    Dictionaries of kernel, registers (a thread), local_bytes (spills of a thread), shared_bytes (a
    block), threads (a block), blocks_per_multiprocessor (resident at once; 0: does not fit).
    """
    if not (load().loaded and has_cuda()):
        return []
    function = library().patchgen_fast_cuda_kernels
    function.argtypes, function.restype = [ctypes.c_int], ctypes.c_char_p
    found: list[dict[str, Any]] = json.loads(function(device).decode())
    return found


def finds_stream() -> bool:
    """Whether the loaded CUDA part finds the function of torch's that gives the current stream:
    a torch built for CUDA has it, with or without a GPU.
    """
    if not (status().loaded and has_cuda()):
        return False
    function = library().patchgen_fast_cuda_finds_stream
    function.argtypes, function.restype = [], ctypes.c_bool
    return bool(function())


def has_cuda() -> bool:
    """Whether CUDA kernels are compiled into the library (not: whether there is a GPU)."""
    return bool(build_record().get("cuda")) and LIBRARY.exists()
