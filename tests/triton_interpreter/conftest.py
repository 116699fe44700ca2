"""Every launcher in these tests allocates guarded, poisoned outputs."""

import pytest


@pytest.fixture(autouse=True)
def allocations(monkeypatch):
    import interpreter

    from patchgen_fast.triton import launch

    made = interpreter.Allocations()
    monkeypatch.setattr(launch, "_allocate", made)
    yield made
    made.check()
