"""The generator's heads, which run many times for every patch drawn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..generator import heads
from ..modules.linear import FastLinear
from ..modules.state import FastLayer
from .adapters import Adapter


class FastFlowHead(FastLayer, heads.FlowHead):
    """The flow head with fewer passes over its modulations, which cost as much as its products."""

    def velocity(self, x: Tensor, modulations: Tensor) -> Tensor:
        self._count_call()
        shape = (-1, self.width)
        parts = modulations.unflatten(-1, shape).unbind(-2)
        scales = (1 + modulations).unflatten(-1, shape).unbind(-2)
        x = self.input(x)
        for i, block in enumerate(self.blocks):
            shift, gate = parts[3 * i + 1], parts[3 * i + 2]
            normalised = torch.addcmul(shift, self.norm(x), scales[3 * i])
            x = torch.addcmul(x, gate, block(normalised))
        return self.out(torch.addcmul(parts[-1], self.norm(x), scales[-2]))


_LINEAR = Adapter(nn.Linear, FastLinear, "feed_forward")

ADAPTERS = (Adapter(heads.FlowHead, FastFlowHead, "layer"),)
# Not the maps from and to a patch's few numbers: they take 10 us, and the op's dispatch as long.
PARTS = {
    heads.PixelHead: {"out": _LINEAR},
    heads.FlowHead: {"time_modulation": _LINEAR, "state_modulation": _LINEAR},
}
