"""How often a user waits for the compiler: specialisations over batch sizes and lengths; and that a
launcher reads nothing back from the device.
"""

from __future__ import annotations

import pytest
from launches import SOURCES, backward, forward, recorded

from patchgen_fast.triton.aot import specialisation
from patchgen_fast.triton.launch import recording


def binaries(*calls) -> int:
    """How many kernels are compiled for all these calls on sm_90."""
    with recording(90) as launches:
        for call in calls:
            call()
    return len({specialisation(item, 90) for item in launches})


BATCHES = (1, 2, 3, 7, 16, 64, 100, 1000)


@pytest.mark.parametrize("d", [64, 72])
def test_a_batch_size_compiles_nothing_new(d: int) -> None:
    one = binaries(lambda: forward(d, 197))
    assert one == binaries(*(lambda b=b: forward(d, 197, batch=b) for b in BATCHES)) == 1
    one = binaries(lambda: backward(d, 577))
    assert one == binaries(*(lambda b=b: backward(d, 577, batch=b) for b in BATCHES)) == 3


def test_heads_compile_nothing_new() -> None:
    calls = [lambda h=h: forward(64, 729, h=h) for h in (1, 3, 12, 16)]
    assert binaries(*calls) == 1


def test_lengths_share_the_streaming_kernel() -> None:
    """One for every N, odd and even, divisible by 16 or not."""
    assert binaries(*(lambda n=n: forward(64, n) for n in range(300, 900, 7))) == 1


def test_short_lengths_share_a_kernel_by_sixteens() -> None:
    """The short kernel's key chunks are compiled in: a kernel for 16 lengths, not for each."""
    lengths = range(129, 257)
    assert binaries(*(lambda n=n: forward(64, n) for n in lengths)) <= len(lengths) / 16


def test_a_growing_cache_compiles_once() -> None:
    """Decoding, step by step: keys 64 to 2000; one kernel for one share and one for several."""
    steps = range(64, 2000, 13)
    assert binaries(*(lambda n=n: forward(64, 1, n, batch=2, causal=True) for n in steps)) <= 3


@pytest.mark.parametrize("source", SOURCES)
def test_a_launcher_reads_nothing_back(source: str) -> None:
    """Safe in a CUDA graph: on meta tensors, which have no values, any read would raise."""
    assert recorded(source, 90)
