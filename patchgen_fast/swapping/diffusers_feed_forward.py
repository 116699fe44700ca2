"""diffusers' `FeedForward`: the activation joins the first product, or that of the gate."""

from __future__ import annotations

from typing import Any

from diffusers.models import activations
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ..modules.fused import inactive, plain_linear, project, unobserved
from ..modules.state import FastLayer
from ..ops.linear import linear
from .adapters import Adapter, Reason, fingerprint

_GELU = {"none": nn.GELU(), "tanh": nn.GELU(approximate="tanh")}


class FastFeedForward(FastLayer, FeedForward):
    """`FeedForward` with GELU, GEGLU, SwiGLU or another activation."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._count_call()
        if args or kwargs.get("scale") is not None:  # diffusers says that it is deprecated
            self._count_fallback("scale")
            whole: Tensor = super().forward(hidden_states, *args, **kwargs)
            return whole
        first, drop, second, *final = self.net
        hidden = self._first(first, hidden_states)
        if not inactive(drop):
            hidden = drop(hidden)
        out = project(self, hidden, second)
        for step in final:
            out = step(out)
        return out

    def _first(self, module: Any, x: Tensor) -> Tensor:
        """The first map of the two and its activation."""
        if unobserved(module):
            if type(module) is activations.GELU:
                return project(self, x, module.proj, activation=_GELU[module.approximate])
            if type(module) is activations.LinearActivation:
                return project(self, x, module.proj, activation=module.activation)
            gate = GATES.get(type(module))
            if gate is not None and plain_linear(module.proj):
                return self._gated(module.proj, gate, x)
        out: Tensor = module(x)
        return out

    def _gated(self, proj: nn.Linear, activation: str, x: Tensor) -> Tensor:
        """`value * activation(gate)` of a projection that makes both, as two products."""
        value, gate = proj.weight.chunk(2)
        value_bias, gate_bias = (None, None) if proj.bias is None else proj.bias.chunk(2)
        backend = self._backend("linear")
        opened = linear(x, gate, gate_bias, activation=activation, backend=backend)
        return linear(x, value, value_bias, backend=backend) * opened


GATES: dict[type, str] = {activations.GEGLU: "gelu", activations.SwiGLU: "silu"}

# of diffusers 0.42
FINGERPRINTS: dict[type, str] = {
    activations.GELU: "cf74f0ff8cf772b6",
    activations.GEGLU: "b7f2d96b9a2c0804",
    activations.SwiGLU: "9eaeae2aad9fb51e",
    activations.LinearActivation: "2faab288627096e9",
}


def _refuse(module: Any) -> Reason | None:
    first = type(module.net[0])
    if first in FINGERPRINTS and fingerprint(first) != FINGERPRINTS[first]:
        return Reason("unknown_version", f"its {first.__name__} differs from the versions known")
    return None


ADAPTERS = (
    Adapter(
        FeedForward,
        FastFeedForward,
        "feed_forward",
        refuse=_refuse,
        fingerprints=("f27182fbe5a4ad8e",),
    ),
)
