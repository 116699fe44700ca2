"""What is installed here, what of it works, and for what does not, why and what to do.

`python -m patchgen_fast info`, or `collect()` for the same as a dictionary.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import click

from patchgen_fast import __version__, _native

PACKAGES = ("torch", "triton", "numpy", "timm", "torchvision", "transformers")


def collect() -> dict[str, Any]:
    """All facts as plain dictionaries and lists; never raises because something is missing."""
    return {
        "versions": versions(),
        "native": native(),
        "cpu": cpu(),
        "gpu": gpu(),
        "ops": ops(),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "patchgen_fast": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def native() -> dict[str, Any]:
    """Whether the native operators, their CUDA part and the native module are there."""
    operators = _native.status()
    record = _native.build_record()
    cuda = _native.Status(True) if _native.has_cuda() else _native.build_failure("cuda")
    facts = _native.Status(True) if _native.info_module() else _native.build_failure("info")
    return {
        "operators": _as_dict(operators),
        "cuda_kernels": _as_dict(cuda)
        | {"archs": record.get("cuda_archs", []), "stream": _native.finds_stream()},
        "native_module": _as_dict(facts),
        "build": {
            key: record[key]
            for key in ("requested", "compiler", "torch", "python")
            if key in record
        },
    }


def _as_dict(status: _native.Status) -> dict[str, Any]:
    return {"loaded": status.loaded, "reason": status.reason, "remedy": status.remedy}


def cpu() -> dict[str, Any]:
    """Model, cores, instruction set in use and those there are, features, caches."""
    from patchgen_fast.calibration import available_cpus

    facts: dict[str, Any] = {
        "model": _cpu_model(),
        "logical_cpus": os.cpu_count(),
        "available_cpus": available_cpus(),
        "isa": None,
        "isa_override": os.environ.get("PATCHGEN_FAST_CPU_ISA") or None,
        "isa_left_out": _native.build_record().get("isa_left_out", {}),
    }
    module = _native.info_module()
    if module is None:
        return facts
    try:
        facts["isa"] = module.chosen_isa()
    except ValueError as error:
        facts["isa_error"] = str(error)
    facts["instruction_sets"] = module.instruction_sets()
    facts["features"] = module.cpu_features()
    facts["caches"] = module.caches()
    return facts


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu() -> dict[str, Any]:
    """The GPUs that torch sees, or why it sees none."""
    try:
        import torch
    except ImportError as error:
        return {"available": False, "reason": f"torch cannot be imported: {error}", "devices": []}
    if torch.version.cuda is None:
        return {"available": False, "reason": "this torch is built for the CPU", "devices": []}
    if not torch.cuda.is_available():
        reason = f"torch is built for CUDA {torch.version.cuda}, and finds no driver or no GPU"
        return {"available": False, "reason": reason, "devices": []}
    devices = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": found.name,
                "capability": f"{found.major}.{found.minor}",
                "memory_bytes": found.total_memory,
                "multiprocessors": found.multi_processor_count,
            }
        )
    return {"available": True, "reason": "", "cuda": torch.version.cuda, "devices": devices}


def kernels() -> dict[str, Any]:
    """Registers, memory and occupancy of the CUDA kernels on each GPU, or why there are none."""
    state = gpu()
    if not _native.has_cuda():
        return {"reason": _native.build_failure("cuda").reason, "gpus": []}
    if not state["available"]:
        return {"reason": state["reason"], "gpus": []}
    gpus = [
        {"name": found["name"], "kernels": _native.cuda_kernels(index)}
        for index, found in enumerate(state["devices"])
    ]
    return {"reason": "", "gpus": gpus}


def ops() -> dict[str, Any]:
    """By op and backend: forward and backward there, or why not."""
    import pkgutil
    from importlib import import_module

    try:
        import patchgen_fast.ops as package
        from patchgen_fast.registry import OPS

        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                import_module(f"patchgen_fast.ops.{module.name}")
    except (ImportError, ValueError) as error:  # no torch, or a wrong PATCHGEN_FAST_CPU_ISA
        return {"error": str(error)}
    return {
        name: {
            backend: {
                "forward": found.unavailable is None,
                "backward": found.has_backward,
                "reason": found.unavailable or "",
            }
            for backend, found in op.backends.items()
        }
        for name, op in OPS.items()
    }


# As text ---------------------------------------------------------------------------------------


def as_text(facts: dict[str, Any]) -> str:
    sections = [
        (
            "Versions",
            [(name, version or "not installed") for name, version in facts["versions"].items()],
        ),
        ("Native part", _native_rows(facts["native"])),
        ("CPU", _cpu_rows(facts["cpu"])),
        ("GPU", _gpu_rows(facts["gpu"])),
        ("Backends by op", _op_rows(facts["ops"])),
    ]
    if "kernels" in facts:
        sections.append(("CUDA kernels", _kernel_rows(facts["kernels"])))
    if "calibration" in facts:
        rows = [(row["label"], row["text"]) for row in facts["calibration_rows"]]
        sections.append(("Measured peaks", rows))
    return "\n\n".join(_section(title, rows) for title, rows in sections)


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {text}".rstrip() for name, text in rows)])


def _native_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    labels = {
        "operators": "operators",
        "cuda_kernels": "CUDA kernels",
        "native_module": "facts and calibration",
    }
    reasons = set()
    for key, label in labels.items():
        state = facts[key]
        archs = f" for {', '.join(state['archs'])}" if state.get("archs") else ""
        if state["loaded"]:
            rows.append((label, f"{'compiled in' if key == 'cuda_kernels' else 'loaded'}{archs}"))
            if not state.get("stream", True):
                rows.append(("", "they rest: this torch has no CUDA, so no stream to launch on"))
        elif state["reason"] in reasons:
            rows.append((label, "not there, for the same reason"))
        else:
            reasons.add(state["reason"])
            rows += [(label, f"not there: {state['reason']}"), ("", f"remedy: {state['remedy']}")]
    build = facts["build"]
    if build:
        text = f"PATCHGEN_FAST_BUILD={build.get('requested', '?')}"
        if "compiler" in build:
            text += f", {build['compiler']}"
        if "torch" in build:
            text += f", against torch {build['torch']}"
        rows.append(("build", text))
    return rows


def _cpu_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    cores = f"{facts['available_cpus']} of {facts['logical_cpus']} logical CPUs usable"
    rows = [("model", facts["model"]), ("cores", cores)]
    if facts.get("isa"):
        by = (
            "by PATCHGEN_FAST_CPU_ISA"
            if facts["isa_override"]
            else "the best of this build and CPU"
        )
        rows.append(("instruction set", f"{facts['isa']} ({by})"))
    if "isa_error" in facts:
        rows.append(("instruction set", facts["isa_error"]))
    for entry in facts.get("instruction_sets", []):
        rows.append((f"  {entry['name']}", "yes" if entry["supported"] else "not on this CPU"))
    for name, reason in facts["isa_left_out"].items():
        rows.append((f"  {name}", f"not compiled in: {reason}"))
    if facts.get("features"):
        rows.append(("features", " ".join(facts["features"])))
    for cache in facts.get("caches", []):
        sharing = f", shared by {cache['shared_by']}" if cache["shared_by"] > 1 else ""
        rows.append((f"L{cache['level']} {cache['type']}", f"{cache['bytes'] >> 10} KiB{sharing}"))
    return rows


def _gpu_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if not facts["available"]:
        return [("none", facts["reason"])]
    return [
        (
            f"cuda:{index}",
            f"{found['name']}, compute capability {found['capability']}, "
            f"{found['memory_bytes'] / 2**30:.0f} GiB, {found['multiprocessors']} multiprocessors",
        )
        for index, found in enumerate(facts["devices"])
    ]


def _op_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if "error" in facts:
        return [("none", facts["error"])]
    rows = []
    told: dict[str, str] = {}  # a reason -> the op where it stands
    for op, backends in facts.items():
        there = []
        for name, state in backends.items():
            if state["forward"]:
                there.append(name if state["backward"] else f"{name} (forward)")
        rows.append((op, ", ".join(there)))
        for name, state in backends.items():
            if reason := state["reason"]:
                first = told.setdefault(reason, op)
                rows.append((f"  not {name}", reason if first == op else f"as for {first}"))
    return rows


def _kernel_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if facts["reason"]:
        return [("none", facts["reason"])]
    rows = []
    for index, found in enumerate(facts["gpus"]):
        rows.append((f"cuda:{index}", found["name"]))
        for kernel in found["kernels"]:
            spills = f", {kernel['local_bytes']} bytes spilled" if kernel["local_bytes"] else ""
            rows.append(
                (
                    f"  {kernel['kernel']}",
                    f"{kernel['registers']} registers{spills}, {kernel['shared_bytes'] / 1024:.1f} "
                    f"KiB shared, {kernel['threads']} threads, "
                    f"{kernel['blocks_per_multiprocessor']} blocks a multiprocessor",
                )
            )
    return rows


# The command -----------------------------------------------------------------------------------


def _progress(done: int, of: int, name: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\033[Kcalibrating {done + 1} of {of}: {name}", nl=False, err=True)
    else:
        click.echo(f"calibrating {done + 1} of {of}: {name}", err=True)


@click.command("info")
@click.option(
    "--format", "output", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@click.option("--calibrate", is_flag=True, help="Also measure this machine's peaks (some seconds).")
@click.option("--kernels", "with_kernels", is_flag=True, help="Also the CUDA kernels on each GPU.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
def command(output: str, calibrate: bool, with_kernels: bool, quiet: bool) -> None:
    """Versions, native kernels and why not, instruction sets, caches, backends by op, GPU."""
    facts = collect()
    if with_kernels:
        facts["kernels"] = kernels()
    if calibrate:
        from patchgen_fast import calibration

        try:
            peaks = calibration.calibrate(progress=None if quiet else _progress)
        except (RuntimeError, ValueError) as error:
            raise click.ClickException(str(error)) from error
        if not quiet and sys.stderr.isatty():
            click.echo("\r\033[K", nl=False, err=True)
        facts["calibration"] = calibration.as_dicts(peaks)
        if output == "text":
            facts["calibration_rows"] = [
                {"label": label, "text": text} for label, text in calibration.as_table(peaks)
            ]
    click.echo(json.dumps(facts, indent=2) if output == "json" else as_text(facts))
