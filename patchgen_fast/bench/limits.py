"""The least work of a case, and how long the measured machine needs for it.

FLOPs are those of torch's own counter: 2·M·N·K a product; attention 4·B·H·Nq·Nk·D forward and 2.5
times that backward (the products are computed again); a layer's backward is twice its forward.
Bytes are those of inputs read once and outputs written once.
"""

from __future__ import annotations

from patchgen_fast.bench.schema import Calibration, Cost

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
BACKWARD_SHARE = {"forward": (1.0, 0.0), "backward": (0.0, 1.0), "both": (1.0, 1.0)}


def phase_total(forward: float, backward: float, phase: str) -> float:
    """Work of a phase from that of forward and backward."""
    with_forward, with_backward = BACKWARD_SHARE[phase]
    return with_forward * forward + with_backward * backward


def attention_cost(
    B: int, H: int, Nq: int, Nk: int, D: int, dtype: str, phase: str, Hkv: int | None = None
) -> Cost:
    """Attention's products, exponentials, and the bytes of its tensors.

    Backward reads q, k, v, out, grad_out and the float32 log-sum-exp, writes three gradients.
    """
    Hkv = Hkv or H
    size = ITEMSIZE[dtype]
    products = 4.0 * B * H * Nq * Nk * D
    queries, keys = B * H * Nq * D * size, B * Hkv * Nk * D * size
    forward_bytes = 2.0 * queries + 2.0 * keys
    backward_bytes = 4.0 * queries + 4.0 * keys + 4.0 * B * H * Nq
    exps = float(B * H * Nq * Nk)
    return Cost(
        flops=phase_total(products, 2.5 * products, phase),
        bytes=phase_total(forward_bytes, backward_bytes, phase),
        exps=phase_total(exps, exps, phase),
    )


def gemm_cost(
    rows: int,
    inputs: int,
    outputs: int,
    dtype: str,
    phase: str,
    *,
    extra_bytes: float = 0.0,
    input_size: int | None = None,
    input_grad: bool = True,
) -> Cost:
    """One product [rows, inputs] x [inputs, outputs] with its tensors; backward is two of them.

    input_size: bytes of an input element when it is not of `dtype` (uint8 images).
    input_grad: whether the input's gradient is part of the backward.
    """
    size = ITEMSIZE[dtype]
    product = 2.0 * rows * inputs * outputs
    read = rows * inputs * (input_size or size) + inputs * outputs * size
    written = rows * outputs * size
    share = 2.0 if input_grad else 1.0
    return Cost(
        flops=phase_total(product, share * product, phase),
        bytes=phase_total(read + written + extra_bytes, 2.0 * read + written, phase),
    )


def bind(cost: Cost, dtype: str, calibration: Calibration | None) -> Cost:
    """Fill in floors and the binding limit from the measured peaks.

    Memory is that of the smallest cache which holds the tensors, else DRAM.
    """
    cost.floors, cost.limit, cost.peak_flops = {}, "", None
    if calibration is None:
        return cost
    cost.peak_is_lower_bound = calibration.disturbed
    peak = calibration.fp32_flops if dtype == "float32" else calibration.bf16_flops
    peak = peak or calibration.fp32_flops
    if peak and cost.flops:
        cost.peak_flops = peak
        cost.floors["products"] = cost.flops / peak
    level = memory_level(cost.bytes, calibration)
    if level and cost.bytes:
        cost.floors[f"memory ({level})"] = cost.bytes / calibration.bandwidth[level]
    if calibration.exps and cost.exps:
        cost.floors["exponentials"] = cost.exps / calibration.exps
    if cost.floors:
        cost.limit = max(cost.floors, key=lambda name: cost.floors[name])
    return cost


def memory_level(size: float, calibration: Calibration) -> str:
    """The level whose bandwidth bounds a working set of this many bytes; "" if none is measured."""
    if calibration.device != "cpu":
        return next(iter(calibration.bandwidth), "")
    for level in ("L2", "L3"):
        room = calibration.cache_bytes.get(level, 0)
        if level == "L2":  # each core's own
            room *= calibration.threads
        if level in calibration.bandwidth and size <= room:
            return level
    return "DRAM" if "DRAM" in calibration.bandwidth else ""
