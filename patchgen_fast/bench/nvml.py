"""What the GPU was doing meanwhile, by nvidia-ml-py: clocks, power, throttling, other processes.

Not measured on a GPU: tested on a made-up NVML.
"""

from __future__ import annotations

from typing import Any

import torch

from patchgen_fast.bench.schema import GpuState

# NVML's names without their prefix, which changed from "Throttle" to "Event" with CUDA 12.4.
REASONS = {
    "GpuIdle": "idle",
    "ApplicationsClocksSetting": "application clocks",
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "sync boost",
    "SwThermalSlowdown": "software thermal slowdown",
    "HwThermalSlowdown": "hardware thermal slowdown",
    "HwPowerBrakeSlowdown": "power brake",
    "DisplayClockSetting": "display clocks",
}
# A power cap is how a large GPU ends every long product: shown, and no disturbance.
DISTURBING = {
    "hardware slowdown",
    "software thermal slowdown",
    "hardware thermal slowdown",
    "power brake",
}


def read(device: int = 0) -> GpuState:
    """The state of a CUDA device now; fields that can't be read stay empty, `missing` says why."""
    try:
        import pynvml
    except ImportError:
        return GpuState(missing="nvidia-ml-py is not installed: pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return GpuState(missing=f"NVML: {error}")
    try:
        return _read(pynvml, _handle(pynvml, device))
    except pynvml.NVMLError as error:
        return GpuState(missing=f"NVML: {error}")
    finally:
        pynvml.nvmlShutdown()


def _handle(pynvml: Any, device: int) -> Any:
    """By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None:
        return pynvml.nvmlDeviceGetHandleByIndex(device)
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def _read(pynvml: Any, handle: Any) -> GpuState:
    state = GpuState()

    def ask(field: str, question: Any) -> None:
        """A card may lack one sensor and have the others."""
        try:
            setattr(state, field, question())
        except pynvml.NVMLError as error:
            state.missing = f"{field}: {error}"

    ask("sm_clock_mhz", lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
    ask("memory_clock_mhz", lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM))
    ask("power_w", lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000.0)
    ask("temperature_c", lambda: pynvml.nvmlDeviceGetTemperature(
        handle, pynvml.NVML_TEMPERATURE_GPU))  # fmt: skip
    ask("throttle", lambda: throttle_reasons(pynvml, handle))
    ask("processes", lambda: len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)))
    return state


def throttle_reasons(pynvml: Any, handle: Any) -> list[str]:
    """Why the clocks are not higher, in words."""
    kind = "Event" if hasattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons") else "Throttle"
    bits = getattr(pynvml, f"nvmlDeviceGetCurrentClocks{kind}Reasons")(handle)
    found = []
    for name, words in REASONS.items():
        # Some names exist in one of the two spellings only.
        bit = next(
            (
                getattr(pynvml, f"nvmlClocks{spelling}Reason{name}")
                for spelling in (kind, "Event", "Throttle")
                if hasattr(pynvml, f"nvmlClocks{spelling}Reason{name}")
            ),
            0,
        )
        if bits & bit:
            found.append(words)
    return found


def disturbance(state: GpuState) -> str:
    """Why a time taken in this state is not to be trusted; empty where it is."""
    reasons = [reason for reason in state.throttle if reason in DISTURBING]
    if state.processes is not None and state.processes > 1:
        reasons.append(f"{state.processes} processes on the GPU")
    return ", ".join(reasons)


def describe(state: GpuState) -> str:
    """The state in one line."""
    parts = []
    if state.sm_clock_mhz is not None:
        parts.append(f"{state.sm_clock_mhz} MHz, memory {state.memory_clock_mhz} MHz")
    if state.power_w is not None:
        parts.append(f"{state.power_w:.0f} W")
    if state.temperature_c is not None:
        parts.append(f"{state.temperature_c} °C")
    if state.throttle:
        parts.append("limited by " + ", ".join(state.throttle))
    if state.processes is not None:
        parts.append(f"{state.processes} process{'es' * (state.processes != 1)}")
    return ", ".join(parts) or state.missing
