"""Each fast layer's error against float64, on the inputs that it meets in the eager model."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..modules.state import state_of


class LayerError(NamedTuple):
    """Largest deviation from float64 as a share of the largest value: ours, and eager's."""

    ours: float
    eager: float


def layer_errors(
    fast: nn.Module, eager: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> dict[str, LayerError]:
    """The error of every fast layer that eager calls, by qualified name."""
    names = [name for name, module in fast.named_modules() if state_of(module) is not None]
    met: dict[str, tuple[Any, Any, Any]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            met.setdefault(name, (args, kwargs, output))

        return hook

    handles = [
        eager.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True)
        for name in names
    ]
    with torch.no_grad():
        try:
            eager(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return {name: _error(fast, eager, name, *found) for name, found in met.items()}


def _error(
    fast: nn.Module, eager: nn.Module, name: str, args: Any, kwargs: Any, output: Any
) -> LayerError:
    ours = fast.get_submodule(name)(*args, **kwargs)
    truth = copy.deepcopy(eager.get_submodule(name)).double()
    wide_args, wide_kwargs = pytree.tree_map(_to_double, (args, kwargs))
    exact = truth(*wide_args, **wide_kwargs)
    return LayerError(_deviation(ours, exact), _deviation(output, exact))


def _to_double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _deviation(got: Any, exact: Any) -> float:
    """The largest over all outputs."""
    worst = 0.0
    for a, b in zip(_floats(got), _floats(exact), strict=True):
        scale = float(b.abs().max()) if b.numel() else 0.0
        worst = max(worst, float((a.double() - b).abs().max()) / scale if scale else 0.0)
    return worst


def _floats(tree: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(tree)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
