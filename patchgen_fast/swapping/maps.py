"""What a model looks at: the attention weights of every layer and head, which fused kernels never
make, computed beside them; their rollout through the layers, and a picture of them over the image.

Rollout: Abnar and Zuidema, 2020, Quantifying attention flow in transformers, arXiv:2005.00928.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.recording import recording
from ..modules.state import state_of

if TYPE_CHECKING:
    from PIL.Image import Image


class AttentionMaps(Mapping[str, Tensor]):
    """Weights `[B, H, Nq, Nk]`, float32, by the qualified name of the layer, in order of running.

    A layer that ran several times has them under `name`, `name#1`, `name#2` and so on.

    Args:
        weights: by name.
        images: those that the model saw, `[B, C, H, W]`, or None.
        grid: rows and columns of patches, or None where it is unknown.
    """

    def __init__(
        self, weights: dict[str, Tensor], images: Tensor | None, grid: tuple[int, int] | None = None
    ) -> None:
        self._weights = weights
        self.images = images
        self.grid = grid

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._weights:
            raise KeyError(f"no attention ran in {name!r}; those that did: {', '.join(self)}")
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def rollout(self, *, residual: float = 0.5) -> Tensor:
        """How much every token of the last layer draws from every token of the first: `[B, N, N]`.

        The product of all layers' weights, averaged over heads, with the identity mixed in for the
        residual stream; rows sum to 1. Takes the layers in which all N tokens attend to each other.

        Args:
            residual: share of the identity, 0 to 1.
        """
        if not 0.0 <= residual <= 1.0:
            raise ValueError(f"expected residual from 0 to 1, got {residual}")
        square = [w for w in self._weights.values() if w.shape[2] == w.shape[3]]
        if not square:
            raise ValueError("expected a layer in which all tokens attend to each other, got none")
        batch, _, tokens, _ = square[0].shape
        if any((len(w), w.shape[2]) != (batch, tokens) for w in square):
            raise ValueError(
                "expected the same tokens in all layers, got "
                f"{sorted({w.shape[2] for w in square})}: windows and stages have no rollout; "
                "look at single layers instead"
            )
        identity = torch.eye(tokens, device=square[0].device)
        total = identity.expand(batch, -1, -1)
        for weights in square:
            mixed = residual * identity + (1.0 - residual) * weights.mean(dim=1)
            total = mixed / mixed.sum(dim=-1, keepdim=True) @ total
        return total

    def heat(
        self,
        layer: str | None = None,
        *,
        head: int | None = None,
        token: int | None = None,
    ) -> Tensor:
        """What is looked at, on the grid of patches: `[B, rows, columns]`, at most 1.

        Args:
            layer: name of a layer; None is the rollout.
            head: of that layer; None is the mean.
            token: the query; None is the first prefix token (the class token), or the mean of all
                queries where there is no prefix.
        """
        if layer is None:
            weights = self.rollout()
        else:
            every = self[layer]
            weights = every.mean(dim=1) if head is None else every[:, head]
        rows, columns = self._grid(weights.shape[-1])
        prefix = weights.shape[-1] - rows * columns
        if token is not None:
            seen = weights[:, token]
        else:
            seen = weights[:, 0] if prefix or weights.shape[1] == 1 else weights.mean(dim=1)
        heat = seen[:, prefix:].unflatten(1, (rows, columns))
        return heat / heat.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)

    def _grid(self, tokens: int) -> tuple[int, int]:
        if self.grid is not None and self.grid[0] * self.grid[1] <= tokens:
            return self.grid
        if self.grid is None:
            side = math.isqrt(tokens)
            return side, side
        raise ValueError(
            f"expected at least {self.grid[0]} x {self.grid[1]} patches among the keys, got "
            f"{tokens} keys; windows and later stages have no place on the whole image"
        )

    def picture(
        self,
        layer: str | None = None,
        *,
        head: int | None = None,
        token: int | None = None,
        index: int = 0,
        strength: float = 0.6,
    ) -> Image:
        """The heat over one of the images, as a Pillow image; needs Pillow.

        Args:
            layer, head, token: as in `heat`.
            index: which image of the batch.
            strength: how much of the image the heat hides, 0 to 1.
        """
        from PIL import Image

        if self.images is None:
            raise ValueError("expected images to draw on, got none; pass them to attention_maps")
        heat = self.heat(layer, head=head, token=token)[index]
        height, width = self.images.shape[-2:]
        smooth = F.interpolate(heat[None, None], (height, width), mode="bilinear")[0, 0]
        image = self.images[index].detach().float().cpu()
        image = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
        low, high = image.amin(), image.amax()
        image = (image - low) / (high - low).clamp_min(1e-12)
        mixed = (1.0 - strength) * image + strength * _warm(smooth.cpu())
        pixels = (mixed.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        return Image.fromarray(pixels.contiguous().numpy())


def _warm(heat: Tensor) -> Tensor:
    """Black over red and yellow to white: `[3, H, W]`."""
    return torch.stack([(3.0 * heat - shift).clamp(0, 1) for shift in (0.0, 1.0, 2.0)])


def attention_maps(model: nn.Module, *inputs: Any, **kwargs: Any) -> AttentionMaps:
    """The attention weights of every swapped layer and head, of one run without gradients.

    The kernels run as always; the weights are computed beside them from the same queries, keys and
    masks, in float32. That needs memory for all of them: `B * H * N * N * 4` bytes a layer.

    Args:
        model: a model that `swap` has made fast; not a compiled one. It runs in the mode that it
            is in: call `model.eval()` first.
        inputs, kwargs: its arguments; images for `picture` are the first tensor `[B, C, H, W]`.

    Returns:
        `AttentionMaps`: `maps[name]` is `[B, H, Nq, Nk]`; `maps.rollout()`, `maps.heat()`,
        `maps.picture().save("seen.png")`.

    Raises:
        ValueError: nothing is swapped in the model, or no swapped attention ran.
    """
    names = {id(m): name for name, m in model.named_modules() if state_of(m) is not None}
    if not names:
        raise ValueError(
            f"expected a model with fast layers, got {type(model).__name__} without; "
            "call patchgen_fast.swap(model) first"
        )
    with recording() as recorded, torch.no_grad():
        model(*inputs, **kwargs)
    weights: dict[str, Tensor] = {}
    for owner, found in recorded:
        name = names.get(owner, "(unknown)")
        again = sum(other.partition("#")[0] == name for other in weights)
        weights[f"{name}#{again}" if again else name] = found
    if not weights:
        raise ValueError(
            "expected a swapped attention layer to run, got none; see print(swap(model)), and "
            "pass the model itself, not a compiled one"
        )
    images = _images((*inputs, *kwargs.values()))
    return AttentionMaps(weights, images, None if images is None else _grid_of(model, images))


def _images(arguments: tuple[Any, ...]) -> Tensor | None:
    return next((x for x in arguments if isinstance(x, Tensor) and x.dim() == 4), None)


def _grid_of(model: nn.Module, images: Tensor) -> tuple[int, int] | None:
    """Rows and columns of patches, from the first layer that cuts some."""
    for module in model.modules():
        if state_of(module) is None:
            continue
        size = getattr(module, "patch_size", None) or getattr(module, "kernel_size", None)
        if isinstance(size, int):
            size = (size, size)
        if size is not None and len(size) == 2:
            return images.shape[-2] // size[0], images.shape[-1] // size[1]
    return None
