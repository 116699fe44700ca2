"""From the decoder's state to a patch: three heads.

Each has the same faces. `loss(states, targets, draws)` is what training minimises; targets are
normalised pixels `[B, n, d]` with d = C * P_h * P_w, states `[B, n, E]`. `sample(states, noise,
...)` draws one patch `[B, d]` from states `[B, E]` and standard normal `noise` `[B, d]`; `sampler`
does so for every patch of a drawing. With classifier-free guidance (Ho and Salimans, 2022,
arXiv:2207.12598) the states are `[2 B, E]`, the second half without the condition, and what the
head predicts is moved from there by `guidance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers import FeedForward


class SamplingOptions(NamedTuple):
    """How a patch is drawn from a head.

    Args:
        guidance: 1 samples as trained; larger follows the condition more closely.
        temperature: factor of the noise; 0 draws the most likely patch.
        steps: integration steps of the flow.
        method: "euler" or "heun" (two evaluations a step, second order).
    """

    guidance: float = 1.0
    temperature: float = 1.0
    steps: int = 8
    method: str = "heun"


def guided(predicted: Tensor, guidance: float) -> Tensor:
    """`without + guidance * (with - without)` for halves `[2 B, ...]`; `[B, ...]`."""
    if guidance == 1.0:
        return predicted
    told, untold = predicted.chunk(2)
    return torch.lerp(untold, told, guidance)


class Head(nn.Module):
    """What the heads share."""

    def sample(self, states: Tensor, noise: Tensor, options: SamplingOptions) -> Tensor:
        raise NotImplementedError

    def sampler(self, options: SamplingOptions) -> Callable[[Tensor, Tensor], Tensor]:
        """`sample(states, noise)` with these options, for the patches of one drawing.

        The weights have to stay as they are meanwhile: what depends on them and on the options
        alone may be computed once.
        """
        return lambda states, noise: self.sample(states, noise, options)


class MeanHead(Head):
    """The mean of the patch, by mean squared error; for reconstruction, where little is unknown."""

    def __init__(self, dim: int, patch_dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, patch_dim)

    def loss(self, states: Tensor, targets: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of normalised pixels, a scalar in float32."""
        return F.mse_loss(self.out(states).float(), targets)

    def sample(self, states: Tensor, noise: Tensor, options: SamplingOptions) -> Tensor:
        """The mean; noise and temperature change nothing."""
        return guided(self.out(states), options.guidance)


class PixelHead(Head):
    """A distribution over `levels` grey levels for each pixel, by cross-entropy.

    The pixels of one patch are independent given the state. Levels lie evenly from `low` to `high`,
    the normalised values of black and white (`[d]` each).
    """

    low: Tensor
    high: Tensor

    def __init__(self, dim: int, patch_dim: int, levels: int, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.levels = levels
        self.out = nn.Linear(dim, patch_dim * levels)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)

    def logits(self, states: Tensor) -> Tensor:
        """`[..., d, levels]` in float32."""
        return self.out(states).float().unflatten(-1, (-1, self.levels))

    def loss(self, states: Tensor, targets: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Mean cross-entropy of a pixel in nats, a scalar in float32."""
        share = (targets - self.low) / (self.high - self.low)
        level = (share * (self.levels - 1)).round().long().clamp(0, self.levels - 1)
        return F.cross_entropy(self.logits(states).flatten(0, -2), level.flatten())

    def sample(self, states: Tensor, noise: Tensor, options: SamplingOptions) -> Tensor:
        """One level a pixel, by inverting the distribution function at Phi(noise)."""
        logits = guided(self.logits(states), options.guidance)
        if options.temperature == 0:
            level = logits.argmax(dim=-1)
        else:
            cumulative = (logits / options.temperature).softmax(dim=-1).cumsum(dim=-1)
            uniform = torch.special.ndtr(noise.float())[..., None]
            level = (cumulative < uniform).sum(dim=-1).clamp(max=self.levels - 1)
        share = level.to(noise.dtype) / (self.levels - 1)
        return torch.lerp(self.low, self.high, share)


class FlowHead(Head):
    """A flow from noise to patches given the state, by flow matching.

    Along straight paths x_t = (1 - t) * noise + t * patch the network learns the velocity
    patch - noise (Lipman et al., 2022, arXiv:2210.02747; Liu et al., 2022, arXiv:2209.03003); a
    sample is the solution of dx/dt = velocity(x, t, state) from t = 0 to 1. One small network
    serves every patch, as the diffusion head of Li et al. (2024, MAR, arXiv:2406.11838) does:
    residual blocks whose normalised input is scaled and shifted, and whose output is gated, by the
    condition (Peebles and Xie, 2022, DiT, arXiv:2212.09748).

    State and time enter those modulations as a sum of linear maps: the state's share, the larger
    part of the work, is computed once a patch and not once an integration step.
    """

    frequencies: Tensor

    def __init__(self, dim: int, patch_dim: int, width: int, depth: int, repeats: int) -> None:
        super().__init__()
        self.width = width
        self.repeats = repeats
        self.input = nn.Linear(patch_dim, width)
        self.of_time = nn.Sequential(nn.Linear(64, width), nn.SiLU())
        modulations = (3 * depth + 2) * width
        self.time_modulation = nn.Linear(width, modulations)
        self.state_modulation = nn.Linear(dim, modulations)
        self.blocks = nn.ModuleList(FeedForward(width, 2 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.out = nn.Linear(width, patch_dim)
        frequencies = math.pi * 2.0 ** torch.linspace(0, 7, 32)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def start_at_zero(self) -> None:
        """Blocks that pass on their input, and a velocity of 0: how training begins."""
        for layer in (self.time_modulation, self.state_modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def modulation_of_time(self, times: Tensor) -> Tensor:
        """The share of times `[...]` in 0 to 1 in the modulations: `[..., (3 depth + 2) width]`."""
        angles = times[..., None] * self.frequencies
        return self.time_modulation(self.of_time(torch.cat((angles.sin(), angles.cos()), dim=-1)))

    def velocity(self, x: Tensor, modulations: Tensor) -> Tensor:
        """Where points x `[..., d]` go; modulations are the sum of state's and time's."""
        *of_blocks, of_out = modulations.split(
            [3 * self.width] * len(self.blocks) + [2 * self.width], -1
        )
        x = self.input(x)
        for block, own in zip(self.blocks, of_blocks, strict=True):
            scale, shift, gate = own.chunk(3, dim=-1)
            x = x + gate * block(torch.addcmul(shift, self.norm(x), 1 + scale))
        scale, shift = of_out.chunk(2, dim=-1)
        return self.out(torch.addcmul(shift, self.norm(x), 1 + scale))

    def loss(self, states: Tensor, targets: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the velocity at times `[R, B]` with noise `[R, B, n, d]`.

        R points on the paths of each patch share the work of the transformer, and the patches of an
        image share their times.
        """
        points = torch.lerp(noise, targets, times[..., None, None])
        modulations = self.state_modulation(states) + self.modulation_of_time(times)[:, :, None]
        return F.mse_loss(self.velocity(points, modulations).float(), targets - noise)

    def sample(self, states: Tensor, noise: Tensor, options: SamplingOptions) -> Tensor:
        """Integrate from `temperature * noise` at t = 0 to a patch at t = 1."""
        of_state = self.state_modulation(states)
        of_times = self.modulation_of_time(times_of(options, noise))
        return integrate(
            lambda x, step: self.velocity(x, of_state + of_times[step]), noise, options
        )


def times_of(options: SamplingOptions, like: Tensor) -> Tensor:
    """The times from 0 to 1 `[steps + 1]` between which is integrated, in the dtype of `like`."""
    return torch.linspace(0, 1, options.steps + 1, device=like.device, dtype=like.dtype)


def integrate(
    velocity: Callable[[Tensor, int], Tensor], noise: Tensor, options: SamplingOptions
) -> Tensor:
    """The solution `[B, d]` at t = 1 of dx/dt = velocity, from `temperature * noise` at t = 0.

    `velocity(x, step)` is that of points `[B, d]` at `times_of(options)[step]`; with guidance, of
    `[2 B, d]`, first with the condition and then without.
    """
    copies = 1 if options.guidance == 1.0 else 2

    def at(x: Tensor, step: int) -> Tensor:
        both = x.repeat(copies, 1) if copies > 1 else x
        return guided(velocity(both, step), options.guidance)

    x, dt = noise * options.temperature, 1 / options.steps
    for step in range(options.steps):
        begin = at(x, step)
        if options.method == "heun":
            begin = (begin + at(x + dt * begin, step + 1)) / 2
        x = x + dt * begin
    return x
