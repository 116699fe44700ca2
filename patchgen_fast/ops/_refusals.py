"""Refusals that many backends share. Each looks at an op's NamedTuple of arguments."""

from __future__ import annotations

import torch

from ..dispatch import Refusal

NOT_ON_CPU = Refusal("device", "it needs tensors on the CPU", lambda a: a[0].device.type != "cpu")
NOT_ON_CUDA = Refusal(
    "device", "it needs tensors on a CUDA device", lambda a: a[0].device.type != "cuda"
)


def float64_of(argument: str) -> Refusal:
    """Kernels and stock compositions leave float64 to the reference; ``argument`` has the dtype."""
    return Refusal(
        "float64",
        "float64 is done by the reference only",
        lambda a: getattr(a, argument).dtype == torch.float64,
    )
