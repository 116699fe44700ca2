"""The key-value cache: what a decoder keeps, so that each new patch costs one step, not a pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of one attention layer, `[B, H, length, D]`, with room for `capacity`.

    The buffers are made once, at the first `append`, in the dtype and on the device of what comes;
    from then on memory is constant. For inference: the buffers hold no gradients.

    `lengths`, int32 `[B]`, is None, or, once the position is data (`DecoderCache.follow`), how many
    of the buffers' positions are filled: the others must not be seen.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"expected a capacity of at least 1 position, got {capacity}")
        self.capacity = capacity
        self.length = 0
        self.lengths: Tensor | None = None
        self._position: Tensor | None = None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values `[B, H, n, D]`; return all so far, as views of the buffers, or the
        whole buffers `[B, H, capacity, D]` where the position is data.

        Raises ValueError when there is no room, or when shape, dtype or device differ from the
        first ones; RuntimeError when gradients are wanted.
        """
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise RuntimeError(
                "a key-value cache holds no gradients: expected to run under torch.no_grad(); "
                "for training pass the whole sequence without a cache"
            )
        if self._keys is None or self._values is None:
            batch, heads, _, head_dim = keys.shape
            self._keys = keys.new_zeros(batch, heads, self.capacity, head_dim)
            self._values = values.new_zeros(batch, heads, self.capacity, values.shape[-1])
        self._check(self._keys, keys)
        if self._position is not None:
            self._keys.index_copy_(2, self._position, keys)
            self._values.index_copy_(2, self._position, values)
            return self._keys, self._values
        end = self.length + keys.shape[2]
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self.view()

    def view(self) -> tuple[Tensor, Tensor]:
        """The keys and values so far, `[B, H, length, D]`, without a copy."""
        if self._keys is None or self._values is None:
            raise RuntimeError("the key-value cache is empty: append to it first")
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def follow(self, position: Tensor, lengths: Tensor) -> None:
        """Write the next position where `position`, int64 `[1]`, says; `lengths` is one more."""
        if self._keys is None:
            raise RuntimeError("the key-value cache is empty: append to it first")
        self._position, self.lengths = position, lengths

    def seen(self) -> Tensor | None:
        """Which positions of the buffers may be seen, bool `[B, 1, 1, capacity]`; None for all."""
        if self.lengths is None:
            return None
        places = torch.arange(self.capacity, device=self.lengths.device)
        return (places < self.lengths[:, None])[:, None, None]

    def _check(self, buffer: Tensor, keys: Tensor) -> None:
        batch, heads, capacity, head_dim = buffer.shape
        if (keys.shape[0], keys.shape[1], keys.shape[3]) != (batch, heads, head_dim):
            raise ValueError(
                f"expected keys [{batch}, {heads}, n, {head_dim}] like those in the cache, "
                f"got {tuple(keys.shape)}; start a new cache for another batch"
            )
        if keys.dtype != buffer.dtype or keys.device != buffer.device:
            raise ValueError(
                f"expected {buffer.dtype} on {buffer.device} like the cache, got {keys.dtype} on "
                f"{keys.device}; start a new cache after moving or converting the model"
            )
        if self.length + keys.shape[2] > capacity:
            raise ValueError(
                f"expected at most {capacity - self.length} more positions in a cache of "
                f"{capacity}, got {keys.shape[2]}; make the cache larger or start a new one"
            )


class LayerCache(NamedTuple):
    """What one decoder layer keeps: its own past, and the keys and values of the memory."""

    own: KeyValueCache
    memory: KeyValueCache


class DecoderCache:
    """One `LayerCache` per decoder layer, with room for `steps` drawn patches in each.

    `memory_length` is the number of tokens of the encoded sequence.
    """

    def __init__(self, depth: int, *, steps: int, memory_length: int) -> None:
        self.layers = [
            LayerCache(KeyValueCache(steps), KeyValueCache(memory_length)) for _ in range(depth)
        ]

    @property
    def length(self) -> int:
        """How many positions have been decoded."""
        return self.layers[0].own.length

    def follow(self, position: Tensor, batch: int) -> None:
        """Make the next position data, int64 `[1]` on the cache's device, instead of `length`.

        Every step, of one new token for each of `batch` sequences, then has the same shapes and
        buffers, as a CUDA graph needs; the value is never read by the host, so nobody checks it
        against the capacity. The buffers are made by a step in the usual way before the first.
        """
        lengths = (position + 1).to(torch.int32).expand(batch).contiguous()
        for layer in self.layers:
            layer.own.follow(position, lengths)
