"""The backends as one fixture: every test of an op runs for all of them.

A backend that can't run here skips with its reason, unless ``PATCHGEN_FAST_TEST_REQUIRE`` names it:
see ``oracle.skip_backend``.
"""

from __future__ import annotations

import gc
import sys

# Importing leaves next to nothing to collect.
gc.disable()

import pytest  # noqa: E402
import torch  # noqa: E402
from oracle import Target, skip_backend  # noqa: E402

from patchgen_fast._torchvision import make_importable  # noqa: E402
from patchgen_fast.modules import fused  # noqa: E402

make_importable()  # the pinned torchvision is built for CUDA, the pinned torch need not be

TARGETS = [Target("reference", "cpu"), Target("torch", "cpu"), Target("cpu", "cpu")]
TARGETS += [Target("triton", "cuda"), Target("cuda", "cuda")]
if torch.cuda.is_available():
    TARGETS += [Target("reference", "cuda"), Target("torch", "cuda")]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "representative: the part of an op's tests that each instruction set runs"
    )
    # Workers with two spinning threads each on two cores wait more than they work; tests of
    # threading set their own number.
    torch.set_num_threads(1)
    # Models here are small: their norms are to run as those of large ones do.
    fused.FEWEST_NORMALISED = 0


def pytest_collection_finish() -> None:
    """From here on garbage is looked for, but not among all that was imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """A backend and its device; skipped where there is no such device."""
    if request.param.device == "cuda" and not torch.cuda.is_available():
        skip_backend(request.param.backend, "no CUDA device")
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _compiles_afresh():
    """The compiler gives up on code that it has compiled too often, whoever asked for it."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
