"""What every fast layer carries: its backend, its run-time counters, and what it replaced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..dispatch import BACKENDS
from ..registry import OPS

KERNELS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
"""The backends with kernels of our own, by device."""


@dataclass
class LayerState:
    """Kept on a fast layer as `_fast`; travels with it through pickle and deepcopy.

    Args:
        backend: for the layer's ops; None takes the fastest.
        original: the class that a swap replaced, which undoing puts back.
        calls: how often the layer ran, compiled runs not counted.
        fell_back: how often it took the eager way, by reason code.
    """

    backend: str | None = None
    original: type[nn.Module] | None = None
    calls: int = 0
    fell_back: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_backend(self.backend)

    def install(self, module: nn.Module, target: type[nn.Module]) -> None:
        """Make a module fast, in place."""
        module.__dict__["_fast"] = self
        module.__class__ = target

    def remove(self, module: nn.Module) -> None:
        """Make it what it was."""
        if self.original is not None:
            module.__class__ = self.original
            del module.__dict__["_fast"]


def check_backend(backend: str | None) -> None:
    """ValueError for a backend that does not exist."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"expected backend None or one of {', '.join(BACKENDS)}, got {backend!r}; "
            "None takes the fastest that accepts"
        )


class FastLayer:
    """Mixin of every fast layer. Its instances carry a `LayerState` as `_fast`."""

    _fast: LayerState

    def _count_call(self) -> None:
        if not torch.compiler.is_compiling():
            self._fast.calls += 1

    def _count_fallback(self, reason: str) -> None:
        if not torch.compiler.is_compiling():
            self._fast.fell_back[reason] = self._fast.fell_back.get(reason, 0) + 1

    def _has_kernel(self, op: str, device: str) -> bool:
        """Whether an op may run by anything but stock operators here, or by a backend named."""
        if self._fast.backend is not None:
            return True
        backends = OPS[op].backends
        return any(backends[name].unavailable is None for name in KERNELS.get(device, ()))

    def _backend(self, op: str) -> str | None:
        """The backend for one of the layer's ops: the one named, where the op has it at all.

        A layer runs several ops, and a backend need not have them all: the layer's main op is
        given the name itself, and runs by it or raises.
        """
        name = self._fast.backend
        if name is None or OPS[op].backends[name].unavailable is not None:
            return None
        return name


def state_of(module: nn.Module) -> LayerState | None:
    """The state of a fast layer, None for any other module."""
    state: Any = module.__dict__.get("_fast")
    return state if isinstance(state, LayerState) else None
