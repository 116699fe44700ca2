"""Where a run was made: commit, versions, processor, GPU. Nothing that names a person or a host."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from patchgen_fast.bench.schema import Environment

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "timm",
    "torchvision",
    "transformers",
    "diffusers",
    "onnxruntime",
    "openvino",
    "flash-attn",
    "flash-attn-3",
    "xformers",
    "scikit-learn",
    "msgspec",
    "nvidia-ml-py",
)
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
    "LD_PRELOAD",
    "MALLOC_ARENA_MAX",
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
)


def collect() -> Environment:
    """Look at this machine; what cannot be found out is an empty string."""
    commit, dirty = git_state()
    isa, native = _native()
    return Environment(
        commit=commit,
        dirty=dirty,
        version=_own_version(),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cpu=cpu_name(),
        cores=len(allowed_cores()),
        isa=isa,
        native=native,
        packages=installed(PACKAGES),
        variables={
            name: value
            for name, value in sorted(os.environ.items())
            if name in VARIABLES or name.startswith("PATCHGEN_FAST_")
        },
        gpu=_gpu(),
        notes=_notes(),
    )


def installed(names: Iterable[str]) -> dict[str, str]:
    """Version by package, for those that are installed."""
    found = {}
    for name in names:
        try:
            # torch's own word, where it is at hand, also says for which GPU it was built.
            module = sys.modules.get(name) if name == "torch" else None
            found[name] = str(getattr(module, "__version__", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def allowed_cores() -> list[int]:
    """The processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_name() -> str:
    """Model of the processor, with its family and model number where the name is vague."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    except OSError:
        return platform.processor() or platform.machine()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']} model {fields['model']})"
    return name


def git_state() -> tuple[str, bool]:
    """Commit of the checkout that holds this package, and whether it has changes; ("", False)."""
    root = Path(__file__).resolve().parents[2]
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return "", False
    return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no"))


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _own_version() -> str:
    import patchgen_fast

    return getattr(patchgen_fast, "__version__", "")


def _native() -> tuple[str, str]:
    """(instruction set, "loaded" or the reason why the native library is not)."""
    from patchgen_fast import _native as native

    module, isa = native.info_module(), ""
    if module is not None:
        with contextlib.suppress(ValueError):  # a wrong PATCHGEN_FAST_CPU_ISA: status() tells it
            isa = module.chosen_isa()
    return isa, str(native.status())


def _gpu() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": str(properties.total_memory),
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or ""),
    }


def _notes() -> list[str]:
    notes = []
    try:
        load = os.getloadavg()[0]
    except OSError:
        load = 0.0
    if load > 0.5 * len(allowed_cores()):
        notes.append(f"other work on the machine: load {load:.1f} at the start")
    return notes
