"""What nvcc made of the CUDA C++ kernels, for every architecture that is shipped; needs no GPU.

    python benchmarks/cuda_code_report.py build/cuda/lib*/patchgen_fast/_kernels.so

reads a library with the CUDA part and writes benchmarks/results/cuda_code.json, which
gpu_code_report.py tabulates. Of each kernel: registers, spills (bytes of stack and local memory a
thread), shared memory of a block at the largest size that the instance serves, and how many blocks
of it a multiprocessor holds. Registers and spills are read from the machine code itself; shared
memory comes from the plans that launch the kernels, run on the host; blocks are the smallest of
what registers, shared memory and warps allow. Nothing here is a measurement of speed.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
RECORD = ROOT / "benchmarks" / "results" / "cuda_code.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cuda_host")]

from patchgen_fast.triton.aot import LIMITS, TOOLS  # noqa: E402

ARCHS = ("80", "86", "89", "90a", "100a", "120a")
REGISTERS = 65536  # of a multiprocessor, on every one of these chips
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "unsigned char": "uint8", "float": "fp32"}
BUILD = "build it with: PATCHGEN_FAST_BUILD=cuda python setup.py build --build-base build/cuda"


@dataclass
class Row:
    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    blocks_per_multiprocessor: int  # 0: more shared memory than a block can have


def digest() -> str:
    """Of all that the kernels are made from: tells whether a record is theirs."""
    files = [path for path in sorted(SOURCES.iterdir()) if path.suffix in (".cu", ".cuh", ".h")]
    named = b"".join(path.name.encode() + path.read_bytes() for path in files)
    return hashlib.sha256(named).hexdigest()


def blocks_per_multiprocessor(arch: str, registers: int, shared: int, threads: int) -> int:
    """Registers are given to warps by 256 within each quarter of the multiprocessor, shared memory
    to blocks by 128 bytes with 1 KiB on top."""
    most_warps, most_blocks, all_shared, shared_of_block = LIMITS[int(arch.rstrip("a"))]
    if shared > shared_of_block:
        return 0
    warps = threads // 32
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // 4 // of_warp * 4 // warps
    by_shared = all_shared // (-(-(shared + 1024) // 128) * 128)
    return min(most_blocks, most_warps // warps, by_registers, by_shared)


def launches(folder: Path) -> dict[str, tuple[int, int]]:
    """kernel -> (threads, bytes of shared memory), of the bf16 instances; fp16 is the same."""
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


def plain_names(mangled: list[str]) -> dict[str, str]:
    """_ZN...attention_forward_kernelI...E -> attention_forward<bf16, 64, 13>"""
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    names = {}
    for symbol, demangled in zip(mangled, done.stdout.splitlines(), strict=True):
        match = re.search(r"(\w+)_kernel<(.*?)>\(", demangled)
        assert match, demangled
        arguments = match[2].replace("patchgen_fast::cuda::", "").split(", ")
        plain = ", ".join(DTYPES.get(a, re.sub(r"^\(int\)", "", a)) for a in arguments)
        names[symbol] = f"{match[1]}<{plain}>"
    return names


def machine_code(library: Path) -> Iterator[tuple[str, str, int, int]]:
    """Kernel, architecture, registers and bytes spilled of all machine code in a binary."""
    text = subprocess.run(
        [str(TOOLS / "cuobjdump"), "-res-usage", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = plain_names(sorted(set(re.findall(r"Function (\w+):", text))))
    for section in re.split(r"^arch = sm_", text, flags=re.MULTILINE)[1:]:
        arch = section.split(maxsplit=1)[0]
        usage = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
        for symbol, registers, stack, local in re.findall(usage, section):
            yield names[symbol], arch, int(registers), int(stack) + int(local)


def rows_of(library: Path) -> list[Row]:
    """One row for each kernel and architecture, in a fixed order."""
    with tempfile.TemporaryDirectory() as folder:
        plans = launches(Path(folder))
    rows = []
    for kernel, arch, registers, spilled in machine_code(library):
        if "_sm90" in kernel and arch != "90a":
            continue  # empty there
        threads, shared = plans[kernel.replace("fp16", "bf16")]
        blocks = blocks_per_multiprocessor(arch, registers, shared, threads)
        rows.append(Row(kernel, arch, registers, spilled, shared, threads, blocks))
    order = {kernel: i for i, kernel in enumerate(plans)}
    key = {row.kernel: order[row.kernel.replace("fp16", "bf16")] for row in rows}
    return sorted(rows, key=lambda row: (key[row.kernel], row.kernel, ARCHS.index(row.arch)))


def compiler() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release \S+, V(\S+)", text)
    return f"nvcc {match[1]}" if match else "nvcc"


def table(record: dict[str, Any]) -> list[str]:
    """The record as a part of the report."""
    rows = {(row["kernel"], row["arch"]): row for row in record["rows"]}
    kernels = [k for k in dict.fromkeys(row["kernel"] for row in record["rows"]) if "fp16" not in k]
    spilled = sum(row["spill_bytes"] > 0 for row in record["rows"])
    apart = max(
        abs(row["registers"] - rows[kernel.replace("fp16", "bf16"), arch]["registers"])
        for (kernel, arch), row in rows.items()
    )
    lines = [
        "## CUDA C++ kernels",
        "",
        f"By {record['compiler']}, from the machine code that is shipped. Registers a thread x "
        "blocks a multiprocessor; threads and KiB of shared memory a block, at the largest size "
        "that the instance serves (0 blocks: more than that chip has; smaller sizes fit); + bytes "
        "of stack a thread, where registers do not suffice. "
        f"{len(record['rows'])} kernels and architectures, {spilled} with spills. fp16 instances "
        f"take the same but for at most {apart} registers.",
        "",
        f"| kernel | threads | KiB | {' | '.join(f'sm_{arch}' for arch in ARCHS)} |",
        f"|---|---|---|{'---|' * len(ARCHS)}",
    ]
    for kernel in kernels:
        of_arch = [rows.get((kernel, arch)) for arch in ARCHS]
        any_row = next(row for row in of_arch if row)
        cells = [
            f"{row['registers']} x {row['blocks_per_multiprocessor']}"
            + (f" + {row['spill_bytes']}" if row["spill_bytes"] else "")
            if row
            else ""
            for row in of_arch
        ]
        lines.append(
            f"| `{kernel}` | {any_row['threads']} | {any_row['shared_bytes'] / 1024:.1f} "
            f"| {' | '.join(cells)} |"
        )
    return lines


def write(record: dict[str, Any]) -> None:
    """A row a line, so that a change is a changed line."""
    head = json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1)
    rows = ",\n".join(json.dumps(row) for row in record["rows"])
    part = RECORD.with_suffix(".part")
    part.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n')
    part.replace(RECORD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path, help="_kernels.so with code for all architectures")
    arguments = parser.parse_args()
    if not arguments.library.exists():
        raise SystemExit(f"expected a library at {arguments.library}; {BUILD}")
    rows = rows_of(arguments.library)
    if missing := set(ARCHS) - {row.arch for row in rows}:
        raise SystemExit(f"no code for sm_{', sm_'.join(sorted(missing))} in it; {BUILD}")
    record = {"kind": "patchgen_fast.cuda_code", "compiler": compiler(), "sources": digest()}
    write({**record, "rows": [asdict(row) for row in rows]})
    spills = [row for row in rows if row.spill_bytes]
    print(f"{len(rows)} kernels and architectures, {len(spills)} with spills: {RECORD}")
    for row in spills:
        print(f"  {row.kernel} on sm_{row.arch}: {row.spill_bytes} bytes")


if __name__ == "__main__":
    main()
