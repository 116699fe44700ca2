"""The committed record of the kernels' machine code: that it is theirs, and as the design says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")  # brings cuobjdump

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cuda_code_report  # noqa: E402

RECORD = json.loads(cuda_code_report.RECORD.read_text())
ROWS = {(row["kernel"], row["arch"]): row for row in RECORD["rows"]}
REMEDY = "run `make gpu-code-report` and commit what changed"


def test_it_is_of_these_sources():
    assert RECORD["sources"] == cuda_code_report.digest(), f"csrc/cuda has changed: {REMEDY}"


def test_it_stands_in_the_report_beside_triton():
    report = (ROOT / "benchmarks/results/gpu-code-report.md").read_text()
    assert "\n".join(cuda_code_report.table(RECORD)) + "\n" in report, REMEDY


def test_every_kernel_is_there_for_every_architecture():
    kernels = {kernel for kernel, _ in ROWS}
    for kernel in kernels:
        archs = {"90a"} if "_sm90" in kernel else set(cuda_code_report.ARCHS)
        assert {arch for other, arch in ROWS if other == kernel} == archs, kernel
        half = re.sub(r"\bbf16\b", "fp16", kernel)
        assert half in kernels, f"{kernel} has no instance for fp16"
    for width in (32, 64, 72, 80, 96, 128):
        for name in ("attention_backward", "attention_decode"):
            assert f"{name}<bf16, {width}>" in kernels
        for tiles in (4, 8, 13, 17):
            assert f"attention_forward<bf16, {width}, {tiles}>" in kernels
    for width in (64, 128):
        assert f"attention_backward_sm90<bf16, {width}>" in kernels
        assert f"attention_backward_masked_sm90<bf16, {width}>" in kernels


def test_nothing_spills():
    assert [key for key, row in ROWS.items() if row["spill_bytes"]] == []


def test_registers_leave_room_for_two_blocks():
    """Which overlap each other's copies and exponentials, wherever shared memory has room too."""
    for key, row in ROWS.items():
        # Pixels of 4 bytes loaded one or two at a time need too many; gradients of wide heads are
        # two warpgroups in one block instead.
        wide = re.match(r"patch_embed_(forward|weight)<fp32, \w+, [12]>", key[0])
        wide = wide or re.match(r"attention_backward_(masked_)?sm90<\w+, 128>", key[0])
        warps = row["threads"] // 32
        of_warp = -(-row["registers"] * 32 // 256) * 256
        assert cuda_code_report.REGISTERS // 4 // of_warp * 4 // warps >= (1 if wide else 2), key


@pytest.mark.parametrize(
    "arch, most",
    [
        ("90a", {32: 272, 64: 272, 72: 272, 80: 208, 96: 208, 128: 128}),
        ("100a", {32: 272, 64: 272, 72: 272, 80: 208, 96: 208, 128: 128}),
        ("80", {32: 272, 64: 208, 72: 208, 80: 128, 96: 128, 128: 64}),
        ("120a", {32: 272, 64: 128, 72: 64, 80: 64, 96: 0, 128: 0}),
    ],
)
def test_two_heads_a_multiprocessor(arch, most):
    """The longest of the sizes 64, 128, 208 and 272 for which two blocks fit, by head dimension."""
    for width, longest in most.items():
        for tiles, tokens in ((4, 64), (8, 128), (13, 208), (17, 272)):
            row = ROWS[f"attention_forward<bf16, {width}, {tiles}>", arch]
            two = row["blocks_per_multiprocessor"] >= 2
            assert two == (tokens <= longest), (width, tokens)


def test_three_warpgroups_a_multiprocessor_take_gradients():
    """By registers; by shared memory up to 208 tokens."""
    for kernel in ("attention_backward_sm90", "attention_backward_masked_sm90"):
        row = ROWS[f"{kernel}<bf16, 64>", "90a"]
        assert row["threads"] == 128 and row["registers"] <= 168


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    "source, options",
    [
        ("attention", ["-DPATCHGEN_FEWER_INSTANCES"]),
        ("attention_forward_bfloat16", []),  # a single instance takes other registers by itself
        ("attention_forward_sm90", ["-DPATCHGEN_FEWER_INSTANCES"]),
        ("attention_backward_sm90", []),
    ],
)
def test_nvcc_makes_the_same_again(source, options, tmp_path):
    """One architecture, and of most files one instance: seconds, where the whole takes minutes."""
    target = tmp_path / "kernels.o"
    command = ["nvcc", "-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-c"]
    command += [*options, str(cuda_code_report.SOURCES / f"{source}.cu")]
    command += ["-Xptxas", "-v", "-o", str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "serialized" not in done.stderr, "products of a warpgroup wait for one another"
    found = list(cuda_code_report.machine_code(target))
    assert found
    for kernel, arch, registers, spilled in found:
        assert spilled == 0, kernel
        if cuda_code_report.compiler() == RECORD["compiler"]:
            assert registers == ROWS[kernel, arch]["registers"], f"{kernel}: {REMEDY}"
