"""Timing on a GPU, on a made-up torch.cuda: what is done in which order, and every way out.

No GPU is needed, and none is measured: that the figures are right is for a GPU to show.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from patchgen_fast.bench import gpu_timing, nvml
from patchgen_fast.bench.cases import select
from patchgen_fast.bench.schema import GpuState
from patchgen_fast.profiling import api


class Card:
    """A GPU whose queue is a list: work is noted when launched, and takes the time it says."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now_ms = 0.0
        self.allocated = self.highest = 0

    def launch(self, name: str, ms: float) -> None:
        self.log.append(name)
        self.now_ms += ms

    def kernel(self, ms: float = 2.0, hold: int = 0):
        def call() -> None:
            self.launch("kernel", ms)
            self.highest = max(self.highest, self.allocated + hold)

        return call


@pytest.fixture
def card(monkeypatch):
    made = Card()

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            made.log.append("record")
            self.at = made.now_ms

        def synchronize(self) -> None:
            made.log.append("wait")

        def elapsed_time(self, end) -> float:
            return end.at - self.at

    class Stream:
        def wait_stream(self, other) -> None:
            made.log.append("wait for stream")

    class Graph:
        def replay(self) -> None:
            made.launch("replay", 1.5)

    @contextlib.contextmanager
    def capture(graph):
        made.log.append("capture")
        yield

    current = Stream()
    for name, value in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: current,
        "synchronize": lambda: made.log.append("synchronize"),
        "reset_peak_memory_stats": lambda: setattr(made, "highest", made.allocated),
        "memory_allocated": lambda: made.allocated,
        "max_memory_allocated": lambda: made.highest,
        "get_device_properties": lambda device: SimpleNamespace(
            L2_cache_size=1 << 20, multi_processor_count=132, major=9, minor=0
        ),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def test_a_cold_sample_flushes_first_and_times_the_call_alone(card):
    flush = SimpleNamespace(zero_=lambda: card.launch("flush", 50.0))
    assert gpu_timing.cold_sample(card.kernel(2.0), flush) == pytest.approx(2e-3)
    assert card.log == ["flush", "record", "kernel", "record", "wait"]


@pytest.mark.parametrize("cache, size", [(1 << 20, 4 << 20), (0, 4 << 26)])
def test_the_flush_is_four_times_the_cache(card, monkeypatch, cache, size):
    """And a size that will do where torch does not know the cache."""
    properties = SimpleNamespace(L2_cache_size=cache)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    made = {}
    monkeypatch.setattr(
        torch, "empty", lambda count, dtype, device: made.update(count=count, device=device)
    )
    gpu_timing.flush_buffer()
    assert made == {"count": size // 4, "device": "cuda:0"}


def test_host_time_never_waits_for_the_queue_within_a_call(card):
    assert 0 <= gpu_timing.host_time(card.kernel(1000.0), calls=3) < 0.5
    assert card.log == ["synchronize", "kernel"] * 3 + ["synchronize"]


def test_a_graph_is_warmed_up_on_its_own_stream_captured_and_replayed(card):
    seconds, refusal = gpu_timing.graph_replay(card.kernel(2.0), replays=4)
    assert (seconds, refusal) == (pytest.approx(1.5e-3), "")
    assert card.log.count("replay") == 4
    assert card.log[: card.log.index("capture")].count("kernel") == 3


def test_what_can_not_be_captured_says_why(card):
    def refuses() -> None:
        if "capture" in card.log:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    assert gpu_timing.graph_replay(refuses) == (
        None,
        "operation not permitted when stream is capturing",
    )
    assert card.log[-1] == "synchronize"


def test_peak_memory_is_beyond_what_was_there(card):
    card.allocated = 1000
    assert gpu_timing.peak_memory(card.kernel(hold=300)) == 300


@pytest.mark.parametrize(
    "state, exps",
    [(GpuState(sm_clock_mhz=1830), 132 * 16 * 1.83e9), (GpuState(missing="no NVML"), None)],
)
def test_the_calibration_has_products_copies_and_exponentials(card, monkeypatch, state, exps):
    tensor = SimpleNamespace(
        to=lambda dtype: tensor,
        numel=lambda: 1 << 28,
        copy_=lambda other: card.launch("copy", 0.5),
    )
    monkeypatch.setattr(torch, "randn", lambda *shape, device: tensor)
    monkeypatch.setattr(torch, "empty_like", lambda other: tensor)
    monkeypatch.setattr(torch, "mm", lambda a, b: card.launch("mm", 2.0))
    monkeypatch.setattr(
        gpu_timing, "flush_buffer", lambda: SimpleNamespace(zero_=lambda: card.launch("flush", 9.0))
    )
    monkeypatch.setattr(nvml, "read", lambda: state)
    found = gpu_timing.calibrate()
    assert found.bf16_flops == pytest.approx(2 * 8192**3 / 2e-3)
    assert found.bandwidth["copy"] == pytest.approx(2 * 4 * 2**28 / 0.5e-3)
    assert found.exps == (None if exps is None else pytest.approx(exps))


def test_exponentials_bind_where_they_take_longest():
    """A narrow head, and a memory that is made up to be fast enough."""
    from patchgen_fast.bench import limits
    from patchgen_fast.bench.schema import Calibration

    case = next(c for c in select("gpu", names=["mae_decoder_b256"]) if c.phase == "forward")
    B, H, N, D = (case.dims[name] for name in "BHND")
    peaks = Calibration(device="cuda", threads=1, source="made up", bf16_flops=790e12,
                        bandwidth={"copy": 43e12}, exps=3.86e12)  # fmt: skip
    cost = limits.attention_cost(B, H, N, N, D, "bfloat16", "forward")
    cost = limits.bind(cost, "bfloat16", peaks)
    assert cost.limit == "exponentials"
    assert cost.floors["exponentials"] == pytest.approx(B * H * N * N / 3.86e12)


def test_profile_asks_the_card_for_its_peak(card, monkeypatch):
    peaks = SimpleNamespace(fp32_flops=1.0, bf16_flops=2.0, source="this card")
    monkeypatch.setattr(gpu_timing, "calibrate", lambda: peaks)
    for dtype, peak in ((torch.float32, 1.0), (torch.bfloat16, 2.0)):
        found = api._peak(torch.device("cuda"), dtype, lambda text: None)
        assert found == (peak, "this card")
