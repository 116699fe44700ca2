"""The feed-forward part of a layer: activation, bias and residual join the two products."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..models.layers import check_last
from .attention import project_and_drop
from .fused import child, inactive, project, takes_residual
from .state import FastLayer, LayerState


class FusedFeedForward(FastLayer):
    """Forward for any class with timm's names: `fc1`, `act`, `drop1`, `norm`, `fc2`, `drop2`."""

    fc1: Any
    act: Any
    drop1: Any
    fc2: Any
    drop2: Any

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[..., in_features]` to `[..., out_features]`."""
        return self.fused_forward(x)

    def fused_forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """`forward(x) + residual`."""
        self._count_call()
        hidden = project(self, x, self.fc1, activation=self.act)
        for step in (self.drop1, child(self, "norm")):
            if step is not None and not inactive(step):
                hidden = step(hidden)
        return project_and_drop(self, hidden, self.fc2, self.drop2, residual)


@takes_residual
class FeedForward(FusedFeedForward, nn.Module):
    """Two linear maps with an activation between them, fast: parameters `fc1`, `fc2`.

    Order of arguments and meaning as in timm's `Mlp`, whose weights load.

    Args:
        in_features: of the tokens.
        hidden_features: between the maps; None is in_features.
        out_features: of the result; None is in_features.
        act_layer: class of the activation; GELU, ReLU and SiLU are fused, others are called.
        norm_layer: class of a normalisation before the second map, or None.
        bias: of both maps, or a pair.
        drop: dropout after each map, in training, or a pair.
        backend: None for the fastest, or a backend by name.

    Raises:
        ValueError: an unknown backend; at a call, another last dimension.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: type[nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        device=None,
        dtype=None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features
        first_bias, second_bias = bias if isinstance(bias, tuple) else (bias, bias)
        first_drop, second_drop = drop if isinstance(drop, tuple) else (drop, drop)
        self.in_features = in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=first_bias, **kind)
        self.act = act_layer()
        self.drop1 = nn.Dropout(first_drop)
        self.norm = norm_layer(hidden_features, **kind) if norm_layer else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=second_bias, **kind)
        self.drop2 = nn.Dropout(second_drop)
        self._fast = LayerState(backend)

    def fused_forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """`forward(x) + residual`."""
        check_last(x, self.in_features)
        return super().fused_forward(x, residual=residual)
