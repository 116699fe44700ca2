"""The generator's heads, which run many times for every patch drawn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..generator import heads
from ..modules.linear import FastLinear
from ..modules.state import FastLayer
from .adapters import Adapter


class FastFlowHead(FastLayer, heads.FlowHead):
    """The flow head, its modulations taken apart at once and applied to a block in three steps, not
    four.
    """

    def velocity(self, x: Tensor, modulations: Tensor) -> Tensor:
        self._count_call()
        parts = modulations.unflatten(-1, (-1, self.width)).unbind(-2)
        x = self.input(x)
        for index, block in enumerate(self.blocks):
            scale, shift, gate = parts[3 * index : 3 * index + 3]
            x = torch.addcmul(x, gate, block(self._modulated(x, scale, shift)))
        return self.out(self._modulated(x, *parts[-2:]))

    def _modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normalised = self.norm(x)
        return torch.addcmul(normalised + shift, normalised, scale)


_LINEAR = Adapter(nn.Linear, FastLinear, "feed_forward")

ADAPTERS = (Adapter(heads.FlowHead, FastFlowHead, "layer"),)
# Not the maps from and to a patch's few numbers: they take 10 us, and the op's dispatch as long.
PARTS = {
    heads.PixelHead: {"out": _LINEAR},
    heads.FlowHead: {"time_modulation": _LINEAR, "state_modulation": _LINEAR},
}
