from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import harness  # noqa: E402


@pytest.fixture(scope="session")
def library(request, tmp_path_factory):
    if reason := harness.why_not():
        pytest.skip(f"kernels not run on the host: {reason}")
    return ctypes.CDLL(str(harness.build(harness.build_folder(request, tmp_path_factory))))


@pytest.fixture(params=["late copies", "early copies"])
def host(request, library):
    """Both extreme timings of asynchronous copies: a kernel must be right under each."""
    return harness.Host(library, late_copies=request.param == "late copies")
