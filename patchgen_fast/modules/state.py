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
        name: the layer's qualified name when it was swapped, for errors and attention maps.
    """

    backend: str | None = None
    original: type[nn.Module] | None = None
    calls: int = 0
    fell_back: dict[str, int] = field(default_factory=dict)
    name: str | None = None

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


def explain(error: Exception, state: LayerState | None) -> None:
    """Add to an error which swapped layer it comes from and how to leave that one out."""
    if state is None or state.name is None or getattr(error, "_patchgen_fast", False):
        return
    error._patchgen_fast = True  # type: ignore[attr-defined]
    remedy = f"filter_fn=lambda module, name: not name.startswith({state.name!r})"
    note = (
        f"This came from the layer {state.name!r}, which patchgen_fast.swap replaced. To leave it "
        f"as it was: swap(model, {remedy})"
    )
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):  # Python 3.10
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])


class FastLayer:
    """Mixin of every fast layer. Its instances carry a `LayerState` as `_fast`."""

    _fast: LayerState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As of any module: LoRA, for one, makes another convolution of the class it finds."""
        super().__init__(*args, **kwargs)
        self._fast = LayerState()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; an error names the layer."""
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            explain(error, self._fast)
            raise

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
