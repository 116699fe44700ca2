"""Microseconds of each Triton op's call on the host, up to the CUDA driver. No GPU needed.

    python benchmarks/host_cost.py

Everything between the public function and the driver runs as on a GPU: our checks and dispatch,
torch's operators, the launcher, Triton's own launch in Python and C. In place of the driver stands
host_cost_driver.c, whose functions return at once, and tensors lie on the CPU, where allocating one
takes about as long as from torch's cache on a GPU. So what is not in the figures is the driver's
own time, and nothing is computed: the kernels are compiled, for sm_90, and never run.

The last column records gradients: the forward alone.

Of many short rounds the least counts: what the code takes where nothing interrupts it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ROUNDS, CALLS = 600, 10


def stand_in(folder: Path) -> ctypes.CDLL:
    """Builds the driver that does nothing and loads it under the name that Triton links."""
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("host_cost_driver.c")
    command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def become_a_gpu(ops: set[str]) -> None:
    """Makes Triton launch on the stand-in, and all that asks for a GPU take the CPU for one."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    import patchgen_fast
    from patchgen_fast import dispatch
    from patchgen_fast.ops import _checks, _refusals
    from patchgen_fast.registry import OPS
    from patchgen_fast.triton import launch, thresholds

    def is_for_triton(args: Any) -> bool:
        device = args[0].device
        return device.type != "cpu" or _refusals._older_than_ampere(device)

    driver = CudaDriver()
    driver.get_device_capability = lambda device=0: (9, 0)
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    triton.runtime.driver.set_active(driver)
    # Code is exchanged where others hold the function itself.
    launch.capability.__code__ = (lambda tensor: 90).__code__
    _checks.is_readable.__code__ = (lambda x: x.device.type == "cuda").__code__
    thresholds._on_gpu.__code__ = (lambda args: args[0].device.type == "cpu").__code__
    thresholds._rules = tuple((64, 1 << 30, training, "triton") for training in (False, True))
    dispatch._ORDERS["cpu"] = dispatch._ORDERS["cuda"]
    refuse = dispatch.Refusal("device", "made up", is_for_triton)
    for op in ops:
        getattr(patchgen_fast, op)  # imports the op, which registers it
        backend = OPS[op].backends["triton"]
        backend.unavailable = None
        OPS[op].backends["cpu"].unavailable = "made up"
        backend.refuses = tuple(refuse if r.code == "device" else r for r in backend.refuses)


def microseconds(call: Callable[[], Any]) -> float:
    """The least of many rounds, a call."""
    for _ in range(4):  # compiled, then recorded, then replayed
        call()
    least = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        least = min(least, time.perf_counter() - start)
    return least / CALLS * 1e6


class Case(NamedTuple):
    """A public call on small tensors, the launcher that it ends in, and what may learn."""

    name: str
    op: str
    call: Callable[[], Any]
    launcher: Callable
    learning: tuple[Any, ...]


def cases() -> list[Case]:
    """One call of every op, and of attention's kernels; by the backend that a user is given, but
    for patch_unembed, where that is torch.
    """
    import torch

    import patchgen_fast as fast
    from patchgen_fast.triton import add_layer_norm as norm
    from patchgen_fast.triton import attention as attend
    from patchgen_fast.triton import patch_embed, patch_unembed, qk_norm_rope, varlen_attention

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(shape).bfloat16()

    def attention(name: str, *qkv: torch.Tensor, **options: Any) -> Case:
        call = partial(fast.attention, *qkv, **options)
        return Case(f"attention, {name}", "attention", call, attend.attention, qkv)

    def packed(batch: int, tokens: int) -> torch.Tensor:
        return half(batch, tokens, 3, 3, 64).permute(2, 0, 3, 1, 4)

    query, cache = half(2, 3, 1, 64), half(2, 3, 1024, 64)
    lengths = torch.full((2,), 200, dtype=torch.int32)
    rows, offsets = half(40, 3, 3, 64).unbind(1), torch.tensor([0, 10, 40], dtype=torch.int32)
    q, k, _ = packed(2, 197)
    ones, table = torch.ones(64), torch.rand(1, 1, 197, 64)
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    weight, bias, places, three = half(96, 3, 16, 16), half(96), half(16, 96), torch.rand(3)
    tokens, back = half(2, 16, 96), half(96, 3, 4, 4)
    x, scale = half(2, 50, 768), half(768)
    return [
        attention("197 tokens", *packed(2, 197)),
        attention("729 tokens", *packed(1, 729)),
        attention("1 query, lengths, 2 kernels", query, cache, cache, kv_lengths=lengths),
        Case(
            "varlen_attention, 2 fills",
            "varlen_attention",
            lambda: fast.varlen_attention(*rows, offsets, offsets, 30, 30),
            varlen_attention.varlen_attention,
            rows,
        ),
        Case(
            "qk_norm_rope",
            "qk_norm_rope",
            lambda: fast.qk_norm_rope(
                q, k, norm="rms", q_weight=ones, k_weight=ones, cos_sin=(table, table)
            ),
            qk_norm_rope.qk_norm_rope,
            (q, k, ones),
        ),
        Case(
            "patch_embed of uint8",
            "patch_embed",
            lambda: fast.patch_embed(
                images, weight, bias, pos_embed=places, mean=three, std=three
            ),
            patch_embed.patch_embed,
            (weight, bias, places),
        ),
        Case(
            "patch_unembed",
            "patch_unembed",
            lambda: fast.patch_unembed(tokens, back, grid_size=(4, 4), backend="triton"),
            patch_unembed.patch_unembed,
            (tokens, back),
        ),
        Case(
            "add_layer_norm",
            "add_layer_norm",
            lambda: fast.add_layer_norm(x, x, scale, scale),
            norm.add_layer_norm,
            (x, scale),
        ),
    ]  # fmt: skip


def launched_with(case: Case) -> tuple:
    """The arguments that a public call ends in."""
    from patchgen_fast.registry import OPS

    calls, seen = OPS[case.op].calls, []
    usual = calls["triton"]
    calls["triton"] = lambda *args: seen.append(args) or usual(*args)
    try:
        case.call()
    finally:
        calls["triton"] = usual
    return seen[0]


def figures(case: Case) -> list[float]:
    """Microseconds of the launcher, of its work anew, and of the call in each of torch's modes."""
    import torch

    args = launched_with(case)
    found = [
        microseconds(partial(case.launcher, *args)),
        microseconds(partial(case.launcher.__wrapped__, *args)),  # type: ignore[attr-defined]
    ]
    for tensor in case.learning:
        tensor.requires_grad_()
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            found.append(microseconds(case.call))
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        driver = stand_in(Path(folder))
        listed = cases()
        become_a_gpu({case.op for case in listed})
        print(f"{'microseconds':42} launcher  its work anew  inference_mode  no_grad  gradients")
        for case in listed:
            line = "{:8.1f}{:15.1f}{:16.1f}{:9.1f}{:11.1f}".format(*figures(case))
            print(case.name.ljust(42) + line, flush=True)
        print(f"{driver.launches_so_far()} launches")


if __name__ == "__main__":
    main()
