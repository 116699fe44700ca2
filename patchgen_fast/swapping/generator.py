"""The generator's heads: linear maps of a patch's few rows, several for every patch drawn."""

from __future__ import annotations

from torch import nn

from ..generator import heads
from ..modules.linear import FastLinear
from .adapters import Adapter

_LINEAR = Adapter(nn.Linear, FastLinear, "feed_forward")

ADAPTERS = ()
PARTS = {
    heads.MeanHead: {"out": _LINEAR},
    heads.PixelHead: {"out": _LINEAR},
    heads.FlowHead: dict.fromkeys(
        ("input", "of_time.0", "time_modulation", "state_modulation", "out"), _LINEAR
    ),
}
