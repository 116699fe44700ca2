"""The generator's heads, which run many times for every patch drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..generator import heads
from ..modules.fused import (
    activation_name,
    inactive,
    linear_parameters,
    plain_layer_norm,
    unobserved,
)
from ..modules.linear import FastLinear
from ..modules.state import FastLayer
from ..ops.linear import linear
from .adapters import Adapter
from .patchgen import FastFeedForward

Map = Callable[[Tensor], Tensor]


class FastFlowHead(FastLayer, heads.FlowHead):
    """The flow head: a modulation is applied in one step instead of two, a sample's modulations are
    made for all times at once, and in training one point on the paths comes after another.
    """

    def loss(self, states: Tensor, targets: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        evaluate = self._evaluation()
        of_state = self.state_modulation(states).unflatten(-1, (-1, self.width)).unbind(-2)
        losses = []
        # All at once would keep tensors so large that the C library takes each afresh from the
        # system and gives it back: their pages cost more than the arithmetic.
        for time, own_noise in zip(times, noise, strict=True):
            of_time = self._parts_of_time(time).unbind(1)
            parts = [one + other for one, other in zip(of_state, of_time, strict=True)]
            velocity = evaluate(torch.lerp(own_noise, targets, time[:, None, None]), parts)
            losses.append(F.mse_loss(velocity.float(), targets - own_noise))
        return torch.stack(losses).mean()

    def sample(self, states: Tensor, noise: Tensor, options: heads.SamplingOptions) -> Tensor:
        return self.sampler(options)(states, noise)

    def sampler(self, options: heads.SamplingOptions) -> Callable[[Tensor, Tensor], Tensor]:
        evaluate, of_times = self._evaluation(), None

        def draw(states: Tensor, noise: Tensor) -> Tensor:
            nonlocal of_times
            if of_times is None:
                of_times = self._parts_of_time(heads.times_of(options, noise))
            of_state = self.state_modulation(states).unflatten(-1, (-1, self.width))
            parts = [part.unbind() for part in of_state.transpose(0, 1) + of_times]
            return heads.integrate(lambda x, step: evaluate(x, parts[step]), noise, options)

        return draw

    def _evaluation(self) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
        """`velocity(x, parts)` with parts `[..., width]` of the modulations, 1 in the scales.

        The children are looked at now, and not at each of their many calls.
        """
        first, last = _product(self.input), _product(self.out)
        normalise, branches = _normalisation(self.norm), [_branch(block) for block in self.blocks]

        def evaluate(x: Tensor, parts: Sequence[Tensor]) -> Tensor:
            self._count_call()
            *of_blocks, scale, shift = parts
            x = first(x)
            for index, branch in enumerate(branches):
                own_scale, own_shift, gate = of_blocks[3 * index : 3 * index + 3]
                x = torch.addcmul(
                    x, gate, branch(torch.addcmul(own_shift, normalise(x), own_scale))
                )
            return last(torch.addcmul(shift, normalise(x), scale))

        return evaluate

    def _parts_of_time(self, times: Tensor) -> Tensor:
        """The share of times `[T]` in the modulations, `[T, 3 depth + 2, 1, width]`, with the 1
        of `1 + scale` in it, so that it is added once.
        """
        parts = self.modulation_of_time(times).unflatten(-1, (-1, self.width))
        ones = parts.new_zeros(parts.shape[1], 1)
        ones[::3] = 1
        return (parts + ones)[:, :, None]


def _normalisation(norm: Any) -> Map:
    """A layer normalisation, by its function where it may be read."""
    if not plain_layer_norm(norm):
        return norm
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: F.layer_norm(x, shape, weight, bias, eps)


def _product(module: Any) -> Map:
    """A linear map, by its weights where they may be read."""
    parameters = linear_parameters(module)
    return module if parameters is None else lambda x: F.linear(x, *parameters)


def _branch(block: Any) -> Map:
    """A feed-forward part, by its two products where its children may be read."""
    if type(block) is not FastFeedForward or not unobserved(block):
        return block
    hidden, out = linear_parameters(block.fc1), linear_parameters(block.fc2)
    name, backend = activation_name(block.act), block._backend("linear")
    if not (hidden and out and name and inactive(block.drop1) and inactive(block.drop2)):
        return block

    def branch(x: Tensor) -> Tensor:
        block._count_call()
        return linear(linear(x, *hidden, activation=name, backend=backend), *out, backend=backend)

    return branch


_LINEAR = Adapter(nn.Linear, FastLinear, "feed_forward")

ADAPTERS = (Adapter(heads.FlowHead, FastFlowHead, "layer"),)
# Not the maps from and to a patch's few numbers: they take 10 us, and the op's dispatch as long.
PARTS = {
    heads.PixelHead: {"out": _LINEAR},
    heads.FlowHead: {"time_modulation": _LINEAR, "state_modulation": _LINEAR},
}
