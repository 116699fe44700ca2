"""From stored pixels to the numbers that a network works on, and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PixelStatistics(nn.Module):
    """A module with a mean and a standard deviation per channel, on the scale 0 to 1, or None.

    They are no part of the state dict, and stay float32 whatever the module is converted to, so
    that a bfloat16 model normalises by the same numbers.
    """

    mean: Tensor | None
    std: Tensor | None

    def set_statistics(
        self, channels: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
    ) -> None:
        """Called once when the module is built. ValueError unless there is a number a channel."""
        self._statistics = {"mean": mean, "std": std}
        for name, values in self._statistics.items():
            if values is not None and len(values) != channels:
                raise ValueError(
                    f"expected {name} with {channels} numbers, one a channel, got {values}"
                )
            buffer = None if values is None else torch.tensor(values, dtype=torch.float32)
            self.register_buffer(name, buffer, persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name, values in self._statistics.items():  # their device alone follows
            buffer = self._buffers[name]
            if buffer is not None:
                self._buffers[name] = torch.tensor(values, device=buffer.device)
        return self

    def normalise(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Images in `dtype`, after division by 255 (uint8), mean and std, in float32 or better."""
        x = images.to(torch.promote_types(dtype, torch.float32))
        if images.dtype == torch.uint8:
            x = x / 255
        if self.mean is not None:
            x = x - self.mean.to(x.dtype)[:, None, None]
        if self.std is not None:
            x = x / self.std.to(x.dtype)[:, None, None]
        return x.to(dtype)

    def denormalise(self, x: Tensor) -> Tensor:
        """The inverse but for uint8: normalised images to the scale 0 to 1, in their dtype."""
        if self.std is not None:
            x = x * self.std.to(x.dtype)[:, None, None]
        if self.mean is not None:
            x = x + self.mean.to(x.dtype)[:, None, None]
        return x
