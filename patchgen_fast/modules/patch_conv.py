"""Convolutions that cut patches (stride = kernel), wherever a library keeps a bare one."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, nn

from ..ops.linear import linear
from ..ops.patch_embed import patch_embed
from ..registry import autocasts
from .fused import is_plain_tensor
from .state import FastLayer


def is_patch_conv(conv: Any) -> bool:
    """Whether a convolution is one product a patch: stride = kernel, and nothing else."""
    return bool(
        type(conv) in (nn.Conv2d, nn.Conv3d)
        and conv.stride == conv.kernel_size
        and prod(conv.kernel_size) > 1
        and (conv.padding == "valid" or all(side == 0 for side in conv.padding))
        and all(step == 1 for step in conv.dilation)
        and conv.groups == 1
    )


class _FusedPatchConv(FastLayer):
    """Forward of a patch convolution: images `[B, C, (T,) H, W]` to a map `[B, E, (t,) h, w]`.

    The map lies in memory as tokens `[B, N, E]`, so that `.flatten(2).transpose(1, 2)` copies
    nothing.
    """

    kernel_size: tuple[int, ...]
    weight: Tensor
    bias: Any

    def forward(self, input: Tensor) -> Tensor:
        self._count_call()
        reason = self._fallback_reason(input)
        if reason is not None:
            self._count_fallback(reason)
            out: Tensor = super().forward(input)  # type: ignore[misc]
            return out
        sides = input.shape[2:]
        grid = tuple(side // patch for side, patch in zip(sides, self.kernel_size, strict=True))
        if tuple(sides) == tuple(self.kernel_size):
            # Patches cut already, one an image, as Qwen-VL has them: one product for all.
            tokens = linear(
                input.flatten(1),
                self.weight.flatten(1),
                self.bias,
                backend=self._backend("linear"),
            )[:, None]
        else:
            tokens = patch_embed(input, self.weight, self.bias, backend=self._fast.backend)
        return tokens.transpose(1, 2).unflatten(2, grid)

    def _fallback_reason(self, x: Tensor) -> str | None:
        """Why a call goes to the parent class; its errors say what is wrong with a wrong one."""
        if x.dim() != len(self.kernel_size) + 2:
            return "unbatched"
        if x.shape[1] != self.weight.shape[1] or any(
            side < patch for side, patch in zip(x.shape[2:], self.kernel_size, strict=True)
        ):
            return "malformed"
        if not (is_plain_tensor(self.weight) and is_plain_tensor(self.bias)):
            return "tensor_subclass"
        return None if x.dtype == self.weight.dtype or autocasts(x) else "dtype"


class FastPatchConv2d(_FusedPatchConv, nn.Conv2d):
    """`nn.Conv2d` with stride = kernel, by the patch-embed op."""


class FastPatchConv3d(_FusedPatchConv, nn.Conv3d):
    """`nn.Conv3d` with stride = kernel, by the patch-embed op or one product."""
