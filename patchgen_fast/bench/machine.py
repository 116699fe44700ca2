"""Hold the machine still for a measurement: which cores, how many threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from patchgen_fast.bench.cases import ONE
from patchgen_fast.bench.environment import allowed_cores


def thread_count(threads: str) -> int:
    """ "one" or "all" as a number on this machine."""
    return 1 if threads == ONE else len(allowed_cores())


@contextlib.contextmanager
def held(threads: int) -> Iterator[None]:
    """Run with this many threads; one thread is pinned to the last core that it may use.

    The last one, because interrupts go to the first by default. Threads that were started while
    pinned would stay on that core, so the pin is lifted before more than one is asked for.
    """
    before, cores = torch.get_num_threads(), allowed_cores()
    pin = threads == 1 and hasattr(os, "sched_setaffinity")
    torch.set_num_threads(threads)
    if pin:
        os.sched_setaffinity(0, {cores[-1]})
    try:
        yield
    finally:
        if pin:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(before)
