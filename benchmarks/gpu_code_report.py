"""What the GPU kernels compile to, chip by chip, and the time that their code alone rules out.

    python benchmarks/gpu_code_report.py              writes benchmarks/results/gpu-code-report.md

No GPU is needed and nothing is timed: every figure is read from machine code or computed from it.
The report is committed, so that a change shows what it did to registers, instructions and bounds.
Triton's part is made here; CUDA C++'s is what cuda_code_report.py last read (it needs nvcc).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "benchmarks" / "results" / "gpu-code-report.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "triton_aot"), str(ROOT / "benchmarks")]

import cuda_code_report  # noqa: E402
from launches import CAPABILITIES, attend, recorded, tabulated  # noqa: E402

from patchgen_fast.triton import attention  # noqa: E402
from patchgen_fast.triton.aot import compile_launch  # noqa: E402
from patchgen_fast.triton.bounds import (  # noqa: E402
    H200,
    decode_bounds,
    forward_bounds,
    keys_a_loop,
    tile_instructions,
)
from patchgen_fast.triton.launch import recording  # noqa: E402

# name, batch, heads, tokens, D: the self-attention forwards whose floors are known.
SHAPES = (
    ("ViT-B", 128, 12, 197, 64),
    ("ViT-B", 256, 12, 197, 64),
    ("MAE encoder", 256, 12, 50, 64),
    ("MAE decoder", 256, 16, 197, 32),
    ("DiT", 64, 16, 256, 72),
    ("ViT-L", 64, 16, 577, 64),
    ("SigLIP", 32, 16, 729, 72),
    ("DiT", 32, 16, 1024, 72),
    ("DINOv2-g", 16, 24, 1370, 64),
    ("video", 1, 16, 8192, 64),
)
OPTIONS = ("PHASES", "BLOCK_M", "BLOCK_N", "BLOCK_K", "ONE_PASS", "num_warps", "num_stages")


def kernel_rows(question: tuple[str, int]) -> list[str]:
    """A table row for each kernel that a source launches on a chip."""
    source, capability = question
    rows = []
    for item in recorded(source, capability):
        binary = compile_launch(item, capability)
        options = ", ".join(
            f"{name.lower().replace('num_', '')} {item.options[name]}"
            for name in OPTIONS
            if name in item.options
        )
        loops = " / ".join(str(loop["all"]) for loop in binary.innermost()) or "none"
        rows.append(
            f"| {source} | `{binary.name.strip('_').removesuffix('_kernel')}` | {options} "
            f"| {binary.registers} | {binary.shared / 1024:.1f} | {binary.blocks} "
            f"| {binary.instructions['all']} | {loops} |"
        )
    return rows


def bound_row(shape: tuple[str, int, int, int, int]) -> str:
    """The four bounds of one forward on sm_90 at an H200's rates."""
    name, batch, heads, tokens, d = shape
    with recording(90) as launches:
        attention.attention(*attend(d, tokens, batch=batch, h=heads))
    (item,) = launches
    binary = compile_launch(item, 90)
    bounds = forward_bounds(binary, item, batch, heads, tokens, tokens, d)
    block_m, keys = item.options["BLOCK_M"], keys_a_loop(item)
    padded = -(-tokens // block_m) * block_m * -(-tokens // keys) * keys
    kind = "short" if "KEY_CHUNKS" in item.options else "streaming"
    return (
        f"| {name} B{batch} H{heads} N{tokens} D{d} | {kind} | {bounds.memory:.1f} "
        f"| {bounds.products:.1f} | {bounds.exponentials:.1f} | {bounds.issue:.1f} "
        f"| {bounds.limit}, {bounds.largest:.1f} | {tokens * tokens / padded:.0%} "
        f"| {tile_instructions(binary, item, keys):.0f} |"
    )


def decode_row() -> str:
    """The same bounds of a decoding step: 64 sequences, 12 heads, 256 keys."""
    batch, heads, keys, d = 64, 12, 256, 64
    with recording(90) as launches:
        attention.attention(*attend(d, 1, keys, batch=batch, h=heads))
    (item,) = launches
    binary = compile_launch(item, 90)
    bounds = decode_bounds(binary, item, batch, heads, heads, 1, keys, d)
    return (
        f"| decode B{batch} H{heads} N1 to {keys} D{d} | decode | {bounds.memory:.1f} "
        f"| {bounds.products:.1f} | {bounds.exponentials:.1f} | {bounds.issue:.1f} "
        f"| {bounds.limit}, {bounds.largest:.1f} | {1 / item.options['ROWS']:.0%} | |"
    )


def report() -> str:
    """The whole document."""
    lines = [
        "# GPU code report",
        "",
        f"Made by `make gpu-code-report` with triton {triton.__version__}, "
        f"torch {torch.__version__.split('+')[0]}, bf16 unless said. **Nothing here is measured on "
        "a GPU**: registers, shared memory and instructions are read from cubins, and times are "
        "lower bounds computed from them.",
        "",
        "## Lower bounds of the attention forward, sm_90",
        "",
        f"Microseconds at the rates of one {H200.name}: {H200.bytes_per_second / 1e12} TB/s, "
        f"{H200.flop_per_second / 1e12:.0f} TFLOP/s of products, "
        f"{H200.exponentials_per_second / 1e12:.2f} T exponentials/s, {H200.multiprocessors} "
        f"multiprocessors at {H200.clock / 1e9} GHz issuing 4 instructions a cycle. Rates are "
        "taken from elsewhere. Products and exponentials include padding; `useful` is the part of "
        "the scores that is not padding; `tile` is warp instructions a 64 x 64 tile of scores in "
        "the main loop, for four warps.",
        "",
        "| shape | kernel | memory | products | exponentials | issue | largest | useful | tile |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(bound_row, SHAPES),
        decode_row(),
    ]
    questions = tabulated()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        answers = dict(zip(questions, pool.map(kernel_rows, questions), strict=True))
    for capability in CAPABILITIES:
        lines += [
            "",
            f"## Triton kernels, sm_{capability}",
            "",
            "Registers a thread, KiB of shared memory a block, blocks a multiprocessor, "
            "instructions in all and in each innermost loop that holds products.",
            "",
            "| call | kernel | configuration | registers | KiB | blocks | instructions | loops |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for question, rows in answers.items():
            lines += rows if question[1] == capability else []
    lines += ["", *cuda_code_report.table(json.loads(cuda_code_report.RECORD.read_text()))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=REPORT)
    output = parser.parse_args().output
    text = report()
    temporary = output.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(output)
    print(output)


if __name__ == "__main__":
    main()
