"""Microseconds of each Triton op's call on the host, up to the CUDA driver. No GPU needed.

    python benchmarks/host_cost.py

Everything between the public function and the driver runs as on a GPU: our checks and dispatch,
torch's operators, the launcher, Triton's own launch in Python and C. In place of the driver stands
host_cost_driver.c, whose functions return at once, and tensors lie on the CPU, where allocating one
takes about as long as from torch's cache on a GPU. So what is not in the figures is the driver's
own time, and nothing is computed: the kernels are compiled, for sm_90, and never run.

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
from pathlib import Path
from typing import Any

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
    """Makes Triton launch on the stand-in, and the "triton" backend take tensors on the CPU."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    import patchgen_fast
    from patchgen_fast.registry import OPS
    from patchgen_fast.triton import launch

    driver = CudaDriver()
    driver.get_device_capability = lambda device=0: (9, 0)
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    triton.runtime.driver.set_active(driver)
    launch.capability.__code__ = (lambda tensor: 90).__code__  # launchers hold the function itself
    for op in ops:
        getattr(patchgen_fast, op)  # imports the op, which registers it
        backend = OPS[op].backends["triton"]
        backend.unavailable = None
        backend.refuses = tuple(r for r in backend.refuses if r.code != "device")
        backend.refuses_backward = tuple(r for r in backend.refuses_backward if r.code != "device")


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


def cases() -> dict[str, tuple[str, Callable[[], Any], Callable]]:
    """The op, a public call on small tensors, and the launcher that it ends in."""
    import torch

    import patchgen_fast as fast
    from patchgen_fast.triton import add_layer_norm as norm
    from patchgen_fast.triton import attention as attend
    from patchgen_fast.triton import patch_embed, patch_unembed, qk_norm_rope, varlen_attention

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(shape).bfloat16()

    def packed(batch: int, tokens: int) -> torch.Tensor:
        return half(batch, tokens, 3, 3, 64).permute(2, 0, 3, 1, 4)

    def attention(q, k, v, **options) -> Callable[[], Any]:
        return lambda: fast.attention(q, k, v, backend="triton", **options)

    cache, lengths = half(2, 3, 1024, 64), torch.full((2,), 200, dtype=torch.int32)
    rows, offsets = half(400, 3, 3, 64).unbind(1), torch.tensor([0, 100, 400], dtype=torch.int32)
    q, k, v = packed(2, 197)
    ones, table = torch.ones(64), torch.rand(1, 1, 197, 64)
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    weight, bias, places, three = half(96, 3, 16, 16), half(96), half(16, 96), torch.rand(3)
    tokens, back = half(2, 16, 96), half(96, 3, 4, 4)
    x, scale = half(2, 50, 768), half(768)
    return {
        "attention, 197 tokens": ("attention", attention(q, k, v), attend.attention),
        "attention, 729 tokens": ("attention", attention(*packed(1, 729)), attend.attention),
        "attention, 1 query, lengths, 2 kernels": (
            "attention",
            attention(q[:, :, :1], cache, cache, kv_lengths=lengths),
            attend.attention,
        ),
        "varlen_attention, 2 fills": (
            "varlen_attention",
            lambda: fast.varlen_attention(*rows, offsets, offsets, 300, 300, backend="triton"),
            varlen_attention.varlen_attention,
        ),
        "qk_norm_rope": (
            "qk_norm_rope",
            lambda: fast.qk_norm_rope(
                q, k, norm="rms", q_weight=ones, k_weight=ones, cos_sin=(table, table),
                backend="triton",
            ),
            qk_norm_rope.qk_norm_rope,
        ),
        "patch_embed of uint8": (
            "patch_embed",
            lambda: fast.patch_embed(
                images, weight, bias, pos_embed=places, mean=three, std=three, backend="triton"
            ),
            patch_embed.patch_embed,
        ),
        "patch_unembed": (
            "patch_unembed",
            lambda: fast.patch_unembed(tokens, back, grid_size=(4, 4), backend="triton"),
            patch_unembed.patch_unembed,
        ),
        "add_layer_norm": (
            "add_layer_norm",
            lambda: fast.add_layer_norm(x, x, scale, scale, backend="triton"),
            norm.add_layer_norm,
        ),
    }  # fmt: skip


def launched_with(op: str, call: Callable[[], Any]) -> tuple:
    """The arguments that a public call ends in."""
    from patchgen_fast.registry import OPS

    overloads, seen = OPS[op].overloads, []
    overload = overloads["triton"]
    overloads["triton"] = lambda *args: seen.append(args) or overload(*args)
    try:
        call()
    finally:
        overloads["triton"] = overload
    return seen[0]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        driver = stand_in(Path(folder))
        import torch

        listed = cases()
        become_a_gpu({op for op, *_ in listed.values()})
        print(f"{'microseconds':42} launcher  its work anew  inference_mode  no_grad")
        for name, (op, call, launcher) in listed.items():
            args = launched_with(op, call)
            figures = [
                microseconds(lambda launcher=launcher, args=args: launcher(*args)),
                microseconds(lambda launcher=launcher, args=args: launcher.__wrapped__(*args)),
            ]
            for context in (torch.inference_mode, torch.no_grad):
                with context():
                    figures.append(microseconds(call))
            print(name.ljust(42) + "{:8.1f}{:15.1f}{:16.1f}{:9.1f}".format(*figures))
        print(f"{driver.launches_so_far()} launches")


if __name__ == "__main__":
    main()
