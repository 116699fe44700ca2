"""The committed code report is that of these kernels, in the rows that are quick to make again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import triton
from launches import recorded

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_code_report  # noqa: E402

REMEDY = "run `make gpu-code-report` and commit what changed"


@pytest.fixture(scope="module")
def report() -> str:
    text = gpu_code_report.REPORT.read_text()
    if f"with triton {triton.__version__}," not in text:
        pytest.skip(f"the report was made with another triton than {triton.__version__}")
    return text


@pytest.mark.parametrize("source", ["short n197", "stream d72", "backward short n197"])
def test_kernels(report: str, source: str) -> None:
    section = report.partition("## Triton kernels, sm_90")[2].partition("## ")[0]
    for row in gpu_code_report.kernel_rows((source, 90)):
        assert row in section, f"not in the report: {row}; {REMEDY}"
    assert section.count(f"| {source} |") == len(recorded(source, 90)), REMEDY


@pytest.mark.parametrize("name", ["ViT-B", "SigLIP"])
def test_bounds(report: str, name: str) -> None:
    shape = next(shape for shape in gpu_code_report.SHAPES if shape[0] == name)
    row = gpu_code_report.bound_row(shape)
    assert row in report, f"not in the report: {row}; {REMEDY}"
