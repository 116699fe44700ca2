"""What a step has to do: products by layer and op, bytes, shapes, and who computes.

FLOPs are those of torch's counter with the formulas that our ops register there. The same count of
the eager model on the meta device, where nothing runs, must come to the same number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from .. import dispatch
from ..modules.state import state_of
from ..registry import Op
from ..swapping import unswap
from .timeline import Place, Timeline, first_tensor, takes

TRAINING = 3  # FLOPs of a training step over those of its forward: two products for each one


@dataclass
class Account:
    """One place: all its calls of a step together."""

    shape: str = ""
    flops: float = 0.0
    bytes: float = 0.0
    backends: set[str] = field(default_factory=set)


def account(
    model: nn.Module, layers: dict[str, nn.Module], forward: Callable[[], Any]
) -> tuple[dict[Place, Account], int]:
    """The accounts of one forward, by place, and the tokens in it.

    Tokens are the rows of the first input with three dimensions, [B, N, E] counting B · N; 0
    without one.
    """
    found: dict[Place, Account] = {}
    tokens = 0

    def on_call(place: Place, called: Any, inputs: Any, output: Any) -> None:
        nonlocal tokens
        entry = found.setdefault(place, Account())
        first = first_tensor(inputs)
        if not tokens and first is not None and first.dim() == 3:
            tokens = first.shape[0] * first.shape[1]
        if isinstance(called, Op):
            entry.shape = entry.shape or takes(called, inputs)
            entry.bytes += size_of((tuple(inputs), output))
            entry.backends.add(backend_of(called, inputs, layers.get(place.layer)))
        elif isinstance(called, nn.Module) and called is layers.get(place.layer):
            entry.shape = entry.shape or (
                "×".join(map(str, first.shape)) if first is not None else ""
            )
            if state_of(called) is None:  # a fast layer's bytes are those of its ops
                own = tuple(called.parameters(recurse=False))
                entry.bytes += size_of((inputs, output, own))

    counter = ProductCounter()
    timeline = Timeline(model, layers, lambda: counter.total, on_call)
    # Not in inference mode, where torch would show composite operators instead of their products.
    with torch.no_grad(), counter, timeline.watching():
        forward()
    for (place, _), flops in timeline.parts().items():
        found.setdefault(place, Account()).flops += flops
    return found, tokens


class ProductCounter(TorchDispatchMode):
    """The FLOPs so far, by the formulas of torch's counter, ours among them.

    Torch's own counter puts hooks on all modules, and a fast layer takes its steps apart for a
    hook to see: it would count another run than the one that is timed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        formula = flop_registry.get(packet)
        if formula is None and packet is not torch.ops.prim.device:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(*(x.shape for x in args[:3]))
        return out


def backend_of(op: Op, args: Any, module: nn.Module | None) -> str:
    """The backend that ran this call: the layer's own if it runs it, else what dispatch takes."""
    state = state_of(module) if module is not None else None
    asked = state.backend if state is not None else None
    if asked is not None and op.backends[asked].refusal(args) is None:
        return asked
    return dispatch.choose(op, args)


def size_of(tree: Any) -> float:
    """Bytes of all tensors in a tree, each once."""
    tensors = {id(x): x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)}
    return float(sum(x.numel() * x.element_size() for x in tensors.values()))


def eager_flops(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> int:
    """FLOPs of a forward of the model as it was before any swap, counted on the meta device."""
    eager = copy.deepcopy(model)
    unswap(eager)
    eager.to("meta")
    args, kwargs = pytree.tree_map(
        lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs)
    )
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        eager(*args, **kwargs)
    return int(counter.get_total_flops())
