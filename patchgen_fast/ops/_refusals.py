"""Refusals that many backends share. Each looks at an op's NamedTuple of arguments."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ..dispatch import Refusal
from ..triton import interpreting

NOT_ON_CPU = Refusal("device", "it needs tensors on the CPU", lambda a: a[0].device.type != "cpu")
NOT_ON_CUDA = Refusal(
    "device", "it needs tensors on a CUDA device", lambda a: a[0].device.type != "cuda"
)


# Both asked once: an environment variable and a GPU's properties take longer than the whole choice.
_INTERPRETING = interpreting()


@cache
def _is_old(device: torch.device) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)


@torch.compiler.assume_constant_result
def _older_than_ampere(device: torch.device) -> bool:
    return _is_old(device)


def _not_for_triton(args: Any) -> bool:
    device = args[0].device
    if _INTERPRETING:
        return bool(device.type != "cpu")
    return device.type != "cuda" or _older_than_ampere(device)


NOT_FOR_TRITON = Refusal(
    "device",
    "it needs tensors on a CUDA device of compute capability 8.0 or later (or on the CPU in a "
    "process with TRITON_INTERPRET=1)",
    _not_for_triton,
)


def float64_of(argument: str) -> Refusal:
    """Kernels and stock compositions leave float64 to the reference; ``argument`` has the dtype."""
    return Refusal(
        "float64",
        "float64 is done by the reference only",
        lambda a: getattr(a, argument).dtype == torch.float64,
    )


def features_above(most: int, argument: str) -> Refusal:
    """A kernel that keeps a whole row in registers takes rows up to a size."""
    return Refusal(
        "features",
        f"rows of more than {most} features are done by torch and reference only",
        lambda a: getattr(a, argument).shape[-1] > most,
    )
