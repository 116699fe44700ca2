"""Timing on a CUDA GPU: events, cold L2, CUDA-graph replay, host time apart.

Not measured on a GPU: what is done in which order is tested on a made-up one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from patchgen_fast.bench import nvml, stats
from patchgen_fast.bench.schema import Calibration, CaseResult, GpuTiming, Timing
from patchgen_fast.bench.timing import Plan, balanced_orders

Call = Callable[[], object]

# Exponentials a cycle of one multiprocessor, by compute capability: CUDA programming guide, the
# table of arithmetic instructions' throughput.
EXPONENTIALS = {capability: 16 for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))}


def flush_buffer(device: int = 0) -> torch.Tensor:
    """A buffer of four times the L2 cache; writing it evicts what earlier calls left there."""
    size = torch.cuda.get_device_properties(device).L2_cache_size or (1 << 26)
    return torch.empty(4 * size // 4, dtype=torch.int32, device=f"cuda:{device}")


def cold_sample(call: Call, flush: torch.Tensor) -> float:
    """Seconds on the GPU of one call with cold L2, by events around it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    # The flush outlasts the launch, so the events see the GPU's time and not the host's.
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def host_time(call: Call, calls: int = 50) -> float:
    """Median seconds until a call returns, with the queue never full."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    torch.cuda.synchronize()
    return stats.median(times)


def graph_replay(call: Call, replays: int = 20) -> tuple[float | None, str]:
    """Median seconds of a replayed CUDA graph (warm L2); or None and why it cannot be captured."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return None, str(error).splitlines()[0]
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return stats.median(times), ""


def peak_memory(call: Call) -> int:
    """Bytes that a call allocates at its peak, beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(result: CaseResult, calls: Mapping[str, Call], plan: Plan) -> None:
    """Interleaved cold samples of every contender, then replay, host time and memory of each."""
    from patchgen_fast.bench.runner import paired_ratio

    flush = flush_buffer()
    for call in calls.values():
        for _ in range(5):
            call()
    torch.cuda.synchronize()
    result.gpu_before = nvml.read()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for rounds, order in enumerate(balanced_orders(list(calls)), 1):
        for name in order:
            seconds[name].append(cold_sample(calls[name], flush))
        spent = time.perf_counter() - started
        if rounds >= 4 * plan.max_rounds or (rounds >= plan.min_rounds and spent > plan.budget_s):
            break
    result.rounds = rounds
    result.gpu_after = nvml.read()
    result.undisturbed = not any(map(nvml.disturbance, (result.gpu_before, result.gpu_after)))
    ours = result.ours
    assert ours is not None
    for cell in result.cells:
        if cell.name not in calls:
            continue
        values = seconds[cell.name]
        low, high = stats.bootstrap_interval(values)
        cell.timing = Timing(
            median=stats.median(values), low=low, high=high, best=min(values), samples=values
        )
        call = calls[cell.name]
        replay, refusal = graph_replay(call)
        cell.gpu = GpuTiming(
            graph_replay=replay,
            graph_refusal=refusal,
            host=host_time(call),
        )
        cell.peak_memory = peak_memory(call)
        if cell is not ours:
            cell.speedup_of_ours = paired_ratio(values, seconds[ours.name])


def calibrate() -> Calibration:
    """Matmul and copy of this GPU, measured now on random data; exponentials by its clock."""
    size, flush = 8192, flush_buffer()

    def best(call: Call, count: int = 20) -> float:
        call()
        return min(cold_sample(call, flush) for _ in range(count))

    def matmul(dtype: torch.dtype) -> float:
        a = torch.randn(size, size, device="cuda").to(dtype)
        b = torch.randn(size, size, device="cuda").to(dtype)
        return 2.0 * size**3 / best(lambda: torch.mm(a, b))

    bf16, fp32 = matmul(torch.bfloat16), matmul(torch.float32)
    exps = exponentials(nvml.read().sm_clock_mhz)  # while the card is still warm
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    rate = 2.0 * source.numel() * 4 / best(lambda: target.copy_(source))
    return Calibration(
        device="cuda",
        threads=1,
        source="torch.mm and copy_ on this GPU" + (", exponentials from its clock" if exps else ""),
        fp32_flops=fp32,
        bf16_flops=bf16,
        bandwidth={"copy": rate},
        exps=exps,
    )


def exponentials(clock_mhz: int | None, device: int = 0) -> float | None:
    """Exponentials a second at this clock; None where the clock or the card is not known."""
    properties = torch.cuda.get_device_properties(device)
    per_cycle = EXPONENTIALS.get((properties.major, properties.minor))
    if clock_mhz is None or per_cycle is None:
        return None
    return per_cycle * properties.multi_processor_count * clock_mhz * 1e6
