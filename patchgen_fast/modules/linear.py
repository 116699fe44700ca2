"""A linear map that stands alone, by its op."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.linear import linear
from .fused import is_plain_tensor
from .state import FastLayer


class FastLinear(FastLayer, nn.Linear):
    """`nn.Linear` whose product is that of the op: gains on a CPU, where rows are few."""

    def forward(self, input: Tensor) -> Tensor:
        """Tokens `[..., in_features]` to `[..., out_features]`."""
        self._count_call()
        if not is_plain_tensor(self.weight) or not is_plain_tensor(self.bias):
            self._count_fallback("tensor_subclass")
            return super().forward(input)
        return linear(input, self.weight, self.bias, backend=self._fast.backend)
