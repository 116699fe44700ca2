"""Every launcher in these tests allocates guarded, poisoned outputs."""

import pytest
from oracle import Target


@pytest.fixture(autouse=True)
def allocations(monkeypatch):
    import interpreter

    from patchgen_fast.triton import launch

    made = interpreter.Allocations()
    monkeypatch.setattr(launch, "_allocate", made)
    yield made
    made.check()


@pytest.fixture
def target() -> Target:
    """Triton's interpreter, for tests that all backends share."""
    return Target("triton", "cpu")
