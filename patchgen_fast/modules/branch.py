"""What may stand between a branch and the sum with its input: layer scale and stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .fused import DROP_TYPES


class LayerScale(nn.Module):
    """Each feature times a learned factor `gamma` `[E]` (Touvron et al. 2021, "Going deeper with
    image transformers"); the parameter is named as in timm.

    Args:
        dim: E.
        init_values: the factors' first value.
    """

    def __init__(self, dim: int, init_values: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[..., E]` to the same."""
        return x * self.gamma


class DropPath(nn.Module):
    """Leaves a whole branch out for a random part of the batch, in training; what stays is divided
    by the probability of staying (Huang et al. 2016, "Deep networks with stochastic depth").

    Args:
        drop_prob: from 0 to below 1, for each sample.

    Raises:
        ValueError: a probability outside of that.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"DropPath: expected drop_prob from 0 to below 1; got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Branches `[B, ...]` to the same."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        stays = 1.0 - self.drop_prob
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(stays)
        return x * (kept / stays)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


DROP_TYPES[DropPath] = "drop_prob"
