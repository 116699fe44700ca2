"""Peers of attention in PyTorch's own terms: each SDPA backend, FlexAttention, flash-attn 2 and 3,
xFormers. All but FlexAttention are for GPUs.

Written against their documented interfaces; not measured on the machine this was written on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from patchgen_fast.bench.cases import Case
from patchgen_fast.bench.peers import Tensors
from patchgen_fast.bench.problems.base import (
    COMPILES,
    Absent,
    Contender,
    Refused,
    Runnable,
    first_line,
    on_leaves,
)

Core = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SDPA_BACKENDS = {
    "sdpa flash": "FLASH_ATTENTION",
    "sdpa cudnn": "CUDNN_ATTENTION",
    "sdpa efficient": "EFFICIENT_ATTENTION",
}


def attention_peers(case: Case, tensors: Tensors) -> list[Contender]:
    """Every peer of attention on this device; what is missing says so when it is made."""
    makers: dict[str, Callable[[], Core]] = {"flex attention": _flex}
    if case.device != "cpu":
        makers |= {name: partial(_sdpa, backend) for name, backend in SDPA_BACKENDS.items()}
        makers |= {"flash-attn 2": _flash2, "flash-attn 3": _flash3, "xformers": _xformers}
    return [
        Contender(
            name,
            "peer",
            partial(_prepare, make, case, tensors),
            forward_only=name == "flex attention" and case.device == "cpu",
            not_quick=COMPILES if name == "flex attention" else "",
        )
        for name, make in makers.items()
    ]


def _prepare(make: Callable[[], Core], case: Case, tensors: Tensors) -> Runnable:
    """Put the peer's core between packed qkv (or q, k, v) and [B,N,C], and try it once."""
    from patchgen_fast.bench.problems.attention import packed, separate

    core = make()
    if case.options.get("packed"):
        runnable = on_leaves(partial(packed, core, case.dims["H"]), tensors)
    else:
        runnable = on_leaves(partial(separate, core), tensors)
    if case.phase == "forward":  # FlexAttention on the CPU refuses inputs that want a gradient
        for tensor in runnable.leaves.values():
            tensor.requires_grad_(False)
    try:
        with torch.inference_mode():
            runnable.forward()
        if case.device != "cpu":
            torch.cuda.synchronize()
    except Exception as error:  # each peer has its own class of refusal; its words are shown
        raise Refused(first_line(error)) from error
    return runnable


def _sdpa(backend: str) -> Core:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(query, key, value)

    return run


def _rows_first(function: Callable[..., Any]) -> Core:
    """Adapt a function on [B,N,H,D] to ours on [B,H,N,D]."""

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def _flash2() -> Core:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Absent("not installed (flash-attn)") from error
    return _rows_first(flash_attn_func)


def _flash3() -> Core:
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError as error:
        raise Absent("not installed (flash-attn 3)") from error
    return _rows_first(flash_attn_func)


def _xformers() -> Core:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise Absent("not installed (xformers)") from error
    return _rows_first(memory_efficient_attention)


def _flex() -> Core:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def varlen_peers(
    case: Case, tensors: Tensors, offsets: torch.Tensor, longest: int
) -> list[Contender]:
    """flash-attn's packed interface."""

    def make() -> Runnable:
        try:
            from flash_attn import flash_attn_varlen_func as flash
        except ImportError as error:
            raise Absent("not installed (flash-attn)") from error

        def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return flash(query, key, value, offsets, offsets, longest, longest)

        return on_leaves(run, tensors)

    return [Contender("flash-attn 2", "peer", make)]
