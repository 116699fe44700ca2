from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import harness  # noqa: E402


def build_folder(request, tmp_path_factory) -> Path:
    """Where compiled kernels stay from one run to the next, or for this run only."""
    cache = getattr(request.config, "cache", None)
    return Path(cache.mkdir("cuda_host") if cache else tmp_path_factory.mktemp("cuda_host"))


@pytest.fixture(scope="session")
def library(request, tmp_path_factory):
    if reason := harness.why_not():
        pytest.skip(f"kernels not run on the host: {reason}")
    return ctypes.CDLL(str(harness.build(build_folder(request, tmp_path_factory))))


@pytest.fixture(params=["late copies", "early copies"])
def host(request, library):
    """Both extreme timings of asynchronous copies: a kernel must be right under each."""
    return harness.Host(library, late_copies=request.param == "late copies")
