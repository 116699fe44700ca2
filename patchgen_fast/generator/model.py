"""The generator: the patch transformer with conditions, an order of drawing, and heads to sample.

    label, seen patches -> memory: one token for the label, then the encoder's tokens of the patches
    start, drawn patches in order -> decoder, which looks at the memory -> state of the next patch
    state -> head -> patch

What is known of an image selects the task:

    nothing            the label "none", nothing seen, nothing given
    a class            the label, nothing seen
    part of it         those patches are seen by the encoder and given to the decoder (completion)
    all of it          all patches are seen, none given: the decoder draws it anew (reconstruction)
    some of it         a random share is seen, none given: another image like it (variation)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import Decoder, DecoderCache, Encoder, PatchTransformerConfig, patchify
from ..models.transformer import take_places
from .heads import FlowHead, MeanHead, PixelHead
from .orders import KINDS as ORDERS
from .orders import OrderKind

HEADS = ("flow", "pixels", "mse")


@dataclass(frozen=True)
class GeneratorConfig:
    """Everything that fixes the shape of a `PatchGenerator`.

    Args:
        transformer: encoder and decoder.
        num_classes: labels 0 to num_classes - 1; 0 where there are none.
        heads: out of "flow", "pixels", "mse"; all are trained, the first is the one that samples.
        order: in which order patches are drawn: "raster", "spiral" or "random".
        levels: grey levels of the head "pixels".
        flow_width, flow_depth: hidden features and blocks of the head "flow".
        flow_repeats: points on the path of each patch in training.
    """

    transformer: PatchTransformerConfig
    num_classes: int = 0
    heads: tuple[str, ...] = ("flow", "mse")
    order: OrderKind = "raster"
    levels: int = 256
    flow_width: int = 256
    flow_depth: int = 3
    flow_repeats: int = 4

    def __post_init__(self) -> None:
        if not self.heads or not set(self.heads) <= set(HEADS):
            raise ValueError(f"expected heads out of {', '.join(HEADS)}, got {self.heads}")
        if self.order not in ORDERS:
            raise ValueError(f"expected an order out of {', '.join(ORDERS)}, got {self.order!r}")
        if self.transformer.prefix_tokens:
            raise ValueError(
                f"expected no prefix tokens, got {self.transformer.prefix_tokens}; "
                "the label's token stands there"
            )
        for name, least in (
            ("num_classes", 0), ("levels", 2),
            ("flow_width", 1), ("flow_depth", 1), ("flow_repeats", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}")

    @property
    def patch_dim(self) -> int:
        """d, the numbers in one patch."""
        channels, height, width = self.transformer.patch_shape
        return channels * height * width


class Task(NamedTuple):
    """What is known of the images, and what is to be drawn.

    Args:
        order: int64 `[N]` or `[B, N]`, the order of drawing.
        seen: places `[n]` or `[B, n]` of the patches that the encoder reads; None for none.
        given: how many patches, the first in order, the decoder need not draw.
    """

    order: Tensor
    seen: Tensor | None = None
    given: int = 0

    def rows(self, part: slice) -> Task:
        """The task for some of the images."""
        order, seen, given = self
        order = order[part] if order.dim() == 2 else order
        return Task(order, seen[part] if seen is not None and seen.dim() == 2 else seen, given)

    def to(self, device: torch.device | str) -> Task:
        """The task on a device."""
        seen = None if self.seen is None else self.seen.to(device)
        return Task(self.order.to(device), seen, self.given)


class PatchGenerator(nn.Module):
    """A patch transformer that is told a class or part of an image, and samples the rest.

        >>> from patchgen_fast.models import CONFIGS
        >>> model = PatchGenerator(GeneratorConfig(CONFIGS["tiny"], num_classes=10)).eval()
        >>> memory = model.memory(torch.tensor([3, 7]))
        >>> memory.shape
        torch.Size([2, 1, 32])

    Images are `[B, C, H, W]`, floats on the scale 0 to 1 or uint8.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.transformer
        self.encoder = Encoder(shape)
        self.decoder = Decoder(shape, head=False)
        self.label = nn.Embedding(config.num_classes + 1, shape.dim)
        self.came_from = (
            nn.Embedding(shape.num_patches, shape.decoder_dim) if config.order == "random" else None
        )
        self.heads = nn.ModuleDict({name: self._new_head(name) for name in config.heads})
        self._initialise()

    def _initialise(self) -> None:
        """Weights that keep the size of what passes, and tokens that are told apart at once.

        Labels and places start as random vectors of about the size of a normalised token, encoder
        and decoder with the same places: cross-attention finds the token of a place from the start,
        where small or smooth codes took thousands of steps.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
        for head in self.heads.values():
            if isinstance(head, FlowHead):
                head.start_at_zero()
        encoder, decoder = self.encoder.pos_embed, self.decoder.pos_embed
        if encoder.requires_grad:
            with torch.no_grad():
                nn.init.normal_(encoder, std=0.5)
                nn.init.normal_(decoder, std=0.5)
                if encoder.shape == decoder.shape:
                    decoder.copy_(encoder)

    def _new_head(self, name: str) -> nn.Module:
        config, dim = self.config, self.config.transformer.decoder_dim
        if name == "mse":
            return MeanHead(dim, config.patch_dim)
        if name == "flow":
            return FlowHead(
                dim, config.patch_dim, config.flow_width, config.flow_depth, config.flow_repeats
            )
        black = torch.zeros(1, *config.transformer.patch_shape)
        low, high = (self.to_patch_vectors(x[:, None]).flatten() for x in (black, black + 1))
        return PixelHead(dim, config.patch_dim, config.levels, low, high)

    @property
    def none(self) -> int:
        """The label that says nothing."""
        return self.config.num_classes

    def check_labels(self, labels: Tensor) -> None:
        """Raises ValueError for a class out of range; reads the values."""
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= self.none:
            raise ValueError(
                f"expected classes from 0 to {self.none - 1}, or {self.none} for none, "
                f"got {int(labels.min())} to {int(labels.max())}"
            )

    def memory(
        self, labels: Tensor, images: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """What the decoder looks at: `[B, 1, E]`, or with images `[B, 1 + n, E]`.

        Labels int64 `[B]`; `seen` are the places `[n]` or `[B, n]` that the encoder reads (None:
        all), and nothing of the images elsewhere reaches the memory.
        """
        told = self.label(labels)[:, None]
        if images is None:
            return told
        if seen is None:
            seen = torch.arange(self.config.transformer.num_patches, device=images.device)
        # Places are added once more behind the encoder: the decoder looks them up by place.
        tokens = self.encoder(images, places=seen) + take_places(self.encoder.pos_embed, seen)
        return torch.cat((told, tokens), dim=1)

    def embed_drawn(self, patches: Tensor, places: Tensor) -> Tensor:
        """Patches `[B, n, C, P_h, P_w]` drawn at places `[n]` or `[B, n]`: tokens `[B, n, E]`."""
        tokens = self.decoder.patch_embed(patches.flatten(0, 1))  # each patch is a small image
        tokens = tokens[:, 0].unflatten(0, patches.shape[:2])
        return tokens if self.came_from is None else tokens + self.came_from(places)

    def states(
        self,
        drawn: Tensor | None,
        order: Tensor,
        memory: Tensor,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """The decoder's states `[B, n, E]`, the last for the patch that follows those drawn.

        Args:
            drawn: patches `[B, n, C, P_h, P_w]` in order; with a cache, those since the last call;
                None for none. The start token comes before the first.
            order: `[N]` or `[B, N]`.
            memory: `[B, M, E]`, see `memory`.
            cache: of `decoder.new_cache`.
        """
        begin = 0 if cache is None else cache.length
        parts = [self.decoder.start.expand(len(memory), -1, -1)] if begin == 0 else []
        if drawn is not None:
            first = max(begin - 1, 0)  # a start token came first
            places = order[..., first : first + drawn.shape[1]]
            parts.append(self.embed_drawn(drawn, places))
        x = torch.cat(parts, dim=1)
        return self.decoder.states(x, memory, cache, places=order[..., begin : begin + x.shape[1]])

    def forward(
        self, images: Tensor, labels: Tensor, task: Task, times: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """The loss of each head over the patches that are to be drawn, scalars in float32.

        Args:
            images: `[B, C, H, W]`.
            labels: int64 `[B]`; `none` where the class is not told.
            task: what is known.
            times, noise: `[R, B]` in 0 to 1 and standard normal `[R, B, N, d]`, for the points on
                the paths of the head "flow".
        """
        patches = take_in_order(patchify(images, self.config.transformer.patch_size), task.order)
        memory = self.memory(labels, None if task.seen is None else images, task.seen)
        states = self.states(patches[:, :-1], task.order, memory)[:, task.given :]
        targets = self.to_patch_vectors(patches[:, task.given :])
        points = times, noise[:, :, task.given :]
        heads: Any = self.heads
        return {name: head.loss(states, targets, *points) for name, head in heads.items()}

    def to_patch_vectors(self, patches: Tensor) -> Tensor:
        """Patches `[B, n, C, P_h, P_w]` on the scale 0 to 1 or uint8, normalised: `[B, n, d]`."""
        return self.decoder.patch_embed.normalise(patches, torch.float32).flatten(2)

    def to_patches(self, vectors: Tensor) -> Tensor:
        """Normalised `[B, d]` to patches `[B, C, P_h, P_w]`, brought into the scale 0 to 1."""
        patches = vectors.unflatten(1, self.config.transformer.patch_shape)
        return self.decoder.patch_embed.denormalise(patches).clamp(0, 1)


def take_in_order(patches: Tensor, order: Tensor) -> Tensor:
    """Patches `[B, N, C, P_h, P_w]` row by row to the order `[N]` or `[B, N]`."""
    return take_places(patches.flatten(2), order).unflatten(2, patches.shape[2:])
