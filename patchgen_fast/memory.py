"""Memory of dead results on the CPU, which the kernels keep for the results to come.

Where torch and the C library would hand a large block to the system and fault it in again page by
page, the CPU kernels keep it. Live and dead, such results take at most `PATCHGEN_FAST_KEPT_MIB`
(256 MiB; 0 for nothing); what is beyond, as most of a training step, is torch's. torch's memory
profiler does not see such results, and they cannot be resized to more than they are. torch before
2.11 cannot be told how they are freed; there nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import _native


def empty_cache() -> None:
    """Hand the memory of dead results back to the system, as `torch.cuda.empty_cache` does."""
    if _native.status().loaded:
        _native.library().patchgen_fast_empty_cache()


def kept_bytes() -> int:
    """Bytes of dead results that are kept now; 0 where no native kernels are loaded."""
    return int(_native.library().patchgen_fast_kept_bytes()) if _native.status().loaded else 0


@contextmanager
def results_by_torch() -> Iterator[None]:
    """Meanwhile the process's results are in torch's own memory, which its profiler counts."""
    if not _native.status().loaded:
        yield
        return
    set_limit = _native.library().patchgen_fast_set_kept_limit
    before = set_limit(0)
    try:
        yield
    finally:
        set_limit(before)
