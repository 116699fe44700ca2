"""The GPU's state by a made-up NVML: what is read, what is missing, what counts as disturbance."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import bench_fakes
import pytest
import torch

from patchgen_fast.bench import gpu_timing, nvml, report
from patchgen_fast.bench.schema import OK, CaseResult, Cell, GpuState


class NVMLError(Exception):
    pass


def fake(**changes):
    """A module like pynvml: one card, found by its UUID, limited by its power cap."""
    made = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlClocksEventReasonGpuIdle=1,
        nvmlClocksEventReasonSwPowerCap=4,
        nvmlClocksThrottleReasonHwSlowdown=8,
        opened=0,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda card, kind: {1: 1980, 2: 2619}[kind],
        nvmlDeviceGetPowerUsage=lambda card: 655_400,
        nvmlDeviceGetTemperature=lambda card, sensor: 61,
        nvmlDeviceGetCurrentClocksEventReasons=lambda card: 4,
        nvmlDeviceGetComputeRunningProcesses=lambda card: ["this one"],
    )
    made.nvmlInit = lambda: setattr(made, "opened", made.opened + 1)
    made.nvmlShutdown = lambda: setattr(made, "opened", made.opened - 1)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def card(monkeypatch):
    """Installs a fake; `card(...)` returns it."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc")
    )

    def install(**changes):
        made = fake(**changes)
        monkeypatch.setitem(sys.modules, "pynvml", made)
        return made

    return install


def test_all_that_is_asked_for(card):
    module = card()
    state = nvml.read()
    assert (state.sm_clock_mhz, state.memory_clock_mhz) == (1980, 2619)
    assert (state.power_w, state.temperature_c) == (655.4, 61)
    assert (state.throttle, state.processes, state.missing) == (["power cap"], 1, "")
    assert nvml.disturbance(state) == "" and module.opened == 0
    said = "1980 MHz, memory 2619 MHz, 655 W, 61 °C, limited by power cap, 1 process"
    assert nvml.describe(state) == said


def test_the_card_is_found_by_its_uuid(card):
    asked = []
    card(nvmlDeviceGetHandleByUUID=asked.append)
    nvml.read()
    assert asked == ["GPU-abc"]


def test_an_old_module_says_throttle(card):
    module = card(nvmlDeviceGetCurrentClocksThrottleReasons=lambda card: 9)
    del module.nvmlDeviceGetCurrentClocksEventReasons
    assert nvml.read().throttle == ["idle", "hardware slowdown"]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"nvmlDeviceGetCurrentClocksEventReasons": lambda card: 12}, "hardware slowdown"),
        (
            {"nvmlDeviceGetComputeRunningProcesses": lambda card: ["this one", "another"]},
            "2 processes on the GPU",
        ),
    ],
)
def test_what_disturbs(card, changes, reason):
    card(**changes)
    assert nvml.disturbance(nvml.read()) == reason


def test_a_missing_sensor_leaves_the_others(card):
    def refuses(card):
        raise NVMLError("Not Supported")

    module = card(nvmlDeviceGetPowerUsage=refuses)
    state = nvml.read()
    assert state.power_w is None and state.sm_clock_mhz == 1980 and module.opened == 0
    assert state.missing == "power_w: Not Supported"


def test_without_the_module_or_the_driver(card, monkeypatch):
    def refuses():
        raise NVMLError("Driver Not Loaded")

    card(nvmlInit=refuses)
    assert nvml.read() == GpuState(missing="NVML: Driver Not Loaded")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in nvml.describe(nvml.read())


@pytest.mark.parametrize("processes, undisturbed", [(["this one"], True), (["a", "b"], False)])
def test_a_timed_case_keeps_the_state_before_and_after(card, monkeypatch, processes, undisturbed):
    card(nvmlDeviceGetComputeRunningProcesses=lambda card: processes)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_timing, "flush_buffer", lambda: None)
    monkeypatch.setattr(gpu_timing, "cold_sample", lambda call, flush: call())
    monkeypatch.setattr(gpu_timing, "graph_replay", lambda call: (None, "no graph here"))
    monkeypatch.setattr(gpu_timing, "host_time", lambda call: 1e-6)
    monkeypatch.setattr(gpu_timing, "peak_memory", lambda call: 100)
    result = CaseResult(
        id="", op="", case="", level="op", shape="", dtype="", phase="", device="cuda",
        threads=1, status=OK,
        cells=[Cell(name=name, role=role, status=OK)
               for name, role in (("eager", "eager"), ("us", "ours"))],
    )  # fmt: skip
    gpu_timing.measure(result, {"eager": lambda: 4e-3, "us": lambda: 2e-3}, bench_fakes.PLAN)
    assert result.gpu_before.power_w == result.gpu_after.power_w == 655.4
    assert result.undisturbed == undisturbed
    assert result.eager.speedup_of_ours.median == 2.0 and result.ours.peak_memory == 100
    shown = dict(report.row(result, []).details)
    assert "1980 MHz" in shown["GPU before"] and "655 W" in shown["GPU after"]


def test_the_real_module_has_what_is_asked_of_it():
    pynvml = pytest.importorskip("pynvml")
    names = fake().__dict__.keys() - {"opened"}
    assert [name for name in names if not hasattr(pynvml, name)] == []
    for reason in nvml.REASONS:
        spellings = [f"nvmlClocks{kind}Reason{reason}" for kind in ("Event", "Throttle")]
        assert any(hasattr(pynvml, name) for name in spellings), reason
