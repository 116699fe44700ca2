"""What nvcc makes of the CUDA C++ kernels, for every architecture that is shipped; needs no GPU.

    python benchmarks/cuda_code_report.py [--archs 80,90a] [--out benchmarks/results/cuda_code.json]

Of each kernel: registers, spills (bytes of stores and loads), shared memory of a block at the
largest size that the instance serves, and how many blocks of it a multiprocessor holds. Registers
and spills are ptxas's own words; shared memory comes from the plans that launch the kernels, run on
the host; blocks are the smallest of what registers, shared memory and warps allow. Nothing here is
a measurement of speed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
ARCHS = ("80", "86", "89", "90a", "100a", "120a")
REGISTERS = 65536  # of a multiprocessor, on every one of these chips
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "unsigned char": "uint8", "float": "fp32"}


@dataclass(frozen=True)
class Chip:
    """Limits of a multiprocessor, from the CUDA programming guide's table of capabilities."""

    warps: int
    blocks: int
    shared: int  # bytes in all
    shared_of_block: int  # bytes


CHIPS = {
    "80": Chip(64, 32, 167936, 166912),
    "86": Chip(48, 16, 102400, 101376),
    "89": Chip(48, 24, 102400, 101376),
    "90a": Chip(64, 32, 233472, 232448),
    "100a": Chip(64, 32, 233472, 232448),
    "120a": Chip(48, 24, 102400, 101376),
}


@dataclass
class Row:
    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    blocks_per_multiprocessor: int  # 0: more shared memory than a block can have


def blocks_per_multiprocessor(chip: Chip, registers: int, shared: int, threads: int) -> int:
    """Registers are given to warps by 256 within each quarter of the multiprocessor, shared memory
    to blocks by 128 bytes with 1 KiB on top."""
    if shared > chip.shared_of_block:
        return 0
    warps = threads // 32
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // 4 // of_warp * 4 // warps
    by_shared = chip.shared // (-(-(shared + 1024) // 128) * 128)
    return min(chip.blocks, chip.warps // warps, by_registers, by_shared)


def launches(folder: Path) -> dict[str, tuple[int, int]]:
    """kernel -> (threads, bytes of shared memory), of the bf16 instances; fp16 is the same."""
    sys.path.insert(0, str(ROOT / "tests" / "cuda_host"))
    import harness

    library = ctypes.CDLL(str(harness.build(folder)))
    found = {}
    for function in ("host_describe_attention", "host_describe_patch_embed"):
        text = ctypes.create_string_buffer(1 << 16)
        getattr(library, function)(text, len(text))
        for line in text.value.decode().splitlines():
            name, threads, shared = line.split("\t")
            found[name] = (int(threads), int(shared))
    return found


def plain_name(mangled: str) -> str:
    """_ZN...attention_forward_kernelI...E -> attention_forward<bf16, 64, 13>"""
    demangled = subprocess.run(
        ["c++filt", mangled], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"(\w+)_kernel<(.*?)>\(", demangled)
    assert match, demangled
    arguments = match[2].replace("patchgen_fast::cuda::", "").split(", ")
    return f"{match[1]}<{', '.join(DTYPES.get(a, re.sub(r'^.int.', '', a)) for a in arguments)}>"


def compiled(source: Path, arch: str, folder: Path) -> Iterator[tuple[str, int, int]]:
    """Kernel, registers and bytes spilled, by ptxas."""
    command = ["nvcc", "-std=c++20", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += ["-Xptxas", "-v", "-c", str(source), "-o", str(folder / "kernels.o")]
    log = subprocess.run(command, capture_output=True, text=True)
    if log.returncode:
        raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{log.stderr}")
    kernel, spilled = "", 0
    for line in log.stderr.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = plain_name(match[1])
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            yield kernel, int(match[1]), spilled


def collect(archs: tuple[str, ...] = ARCHS) -> list[Row]:
    """One row for each kernel and architecture."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plans = launches(folder)
        for arch in archs:
            for source in sorted(SOURCES.glob("*.cu")):
                for kernel, registers, spilled in compiled(source, arch, folder):
                    if "_sm90" in kernel and arch != "90a":
                        continue  # empty there
                    threads, shared = plans[kernel.replace("fp16", "bf16")]
                    blocks = blocks_per_multiprocessor(CHIPS[arch], registers, shared, threads)
                    rows.append(Row(kernel, arch, registers, spilled, shared, threads, blocks))
            print(f"sm_{arch}: {sum(row.arch == arch for row in rows)} kernels", flush=True)
    return rows


def compiler() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release \S+, V(\S+)", text)
    return f"nvcc {match[1]}" if match else "nvcc"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default=",".join(ARCHS))
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "cuda_code.json"))
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("no nvcc on PATH: install the CUDA toolkit, 13.0 or later")
    rows = collect(tuple(arguments.archs.split(",")))
    record = {"compiler": compiler(), "rows": [asdict(row) for row in rows]}
    out = Path(arguments.out)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(out)
    spills = [row for row in rows if row.spill_bytes]
    print(f"{len(rows)} rows, {len(spills)} with spills, written to {out.name}")
    for row in spills:
        print(f"  {row.kernel} on sm_{row.arch}: {row.spill_bytes} bytes")


if __name__ == "__main__":
    main()
