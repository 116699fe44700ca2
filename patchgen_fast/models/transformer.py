"""The patch transformer: an encoder that reads an image, a decoder that draws it patch by patch.

    image -> patches -> + positions -> encoder layers -> memory                       (`Encoder`)
    start, x1 .. x(n-1) -> + positions -> decoder layers, which look at the memory
                                       -> x1 .. xn -> image                           (`Decoder`)

The decoder draws patch n from the patches before it and from the memory. In training all patches
are predicted in one pass (each from the true ones before it); in generation each drawn patch is
fed back, and a key-value cache makes every step cost one token.

Plain eager PyTorch throughout; `patchgen_fast.swap(model)` makes it fast.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .cache import DecoderCache
from .configs import CONFIGS, PatchTransformerConfig
from .layers import DecoderLayer, EncoderLayer, PatchEmbed, PatchUnembed, check_tokens
from .patches import patchify, unpatchify
from .positions import position_table


def take_places(tokens: Tensor, places: Tensor) -> Tensor:
    """The tokens `[B or 1, N, E]` at places, int64 `[n]` or `[B, n]`: `[B or 1, n, E]`."""
    if places.dim() == 1:
        return tokens[:, places]
    index = places[..., None].expand(-1, -1, tokens.shape[2])
    return tokens.expand(len(places), -1, -1).gather(1, index)


class Encoder(nn.Module):
    """A vision transformer: images `[B, C, H, W]` to a memory `[B, P + N, E]`."""

    def __init__(self, config: PatchTransformerConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(
            config.image_size,
            config.patch_size,
            config.channels,
            config.dim,
            mean=config.mean,
            std=config.std,
        )
        self.pos_embed = position_table(config.positions, config.grid_size, config.dim)
        self.num_prefix_tokens = config.prefix_tokens
        self.prefix = (
            nn.Parameter(0.02 * torch.randn(1, config.prefix_tokens, config.dim))
            if config.prefix_tokens
            else None
        )
        self.layers = nn.ModuleList(
            EncoderLayer(
                config.dim,
                config.num_heads,
                config.mlp_ratio,
                config.qkv_bias,
                config.qk_norm,
                config.dropout,
                config.attention_dropout,
                norm_eps=config.norm_eps,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)

    def forward(
        self, images: Tensor, num_given: int | None = None, *, places: Tensor | None = None
    ) -> Tensor:
        """Encode whole images, or only their first `num_given` patches, or those at `places`.

        `places`: int64 numbers of patches, `[n]` or one row an image `[B, n]`; the memory has them
        in that order.
        """
        x = self.patch_embed(images, pos_embed=self.pos_embed, prefix=self.prefix)
        if num_given is not None:
            x = x[:, : self.num_prefix_tokens + num_given]
        if places is not None:
            prefix, patches = x.tensor_split((self.num_prefix_tokens,), dim=1)
            x = torch.cat((prefix, take_places(patches, places)), dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Decoder(nn.Module):
    """Draws patches one after the other; its `head` turns a token into a patch.

    Without a head (`head=False`) it is for callers of `states` that have heads of their own.
    """

    def __init__(self, config: PatchTransformerConfig, *, head: bool = True) -> None:
        super().__init__()
        dim = config.decoder_dim
        self.patch_shape = config.patch_shape
        self.num_patches = config.num_patches
        # Any number of patches can be embedded and drawn at a time, so neither fixes a size.
        self.patch_embed = PatchEmbed(
            None, config.patch_size, config.channels, dim, mean=config.mean, std=config.std
        )
        self.start = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = position_table(config.positions, config.grid_size, dim)
        self.layers = nn.ModuleList(
            DecoderLayer(
                dim,
                config.decoder_num_heads,
                config.mlp_ratio,
                config.qkv_bias,
                config.qk_norm,
                config.dropout,
                config.attention_dropout,
                memory_dim=config.dim,
                norm_eps=config.norm_eps,
            )
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(dim, config.norm_eps)
        if head:
            self.head = PatchUnembed(config.grid_size, config.patch_size, config.channels, dim)

    def new_cache(self, memory: Tensor, steps: int | None = None) -> DecoderCache:
        """An empty cache for drawing `steps` patches (all of the image by default)."""
        return DecoderCache(
            len(self.layers), steps=steps or self.num_patches, memory_length=memory.shape[1]
        )

    def states(
        self,
        x: Tensor,
        memory: Tensor,
        cache: DecoderCache | None = None,
        *,
        places: Tensor | None = None,
    ) -> Tensor:
        """Run embedded inputs `[B, n, E]` through the layers; they follow what the cache holds.

        `places`, int64 `[n]` or `[B, n]`, are the numbers of the patches to be drawn from these
        inputs; by default the next ones row by row.
        """
        begin = 0 if cache is None else cache.length
        if places is None:
            x = x + self.pos_embed[:, begin : begin + x.shape[1]]
        else:
            x = x + take_places(self.pos_embed, places)
        for index, layer in enumerate(self.layers):
            x = layer(x, memory, cache=None if cache is None else cache.layers[index])
        return self.norm(x)

    def forward(self, images: Tensor, memory: Tensor) -> Tensor:
        """Every patch of the images `[B, C, H, W]`, each predicted from the true ones before it.

        Normalised pixels, like the input of the projection: see `PatchTransformer.to_pixels`.
        """
        drawn = self.patch_embed(images)[:, :-1]
        start = self.start.expand(len(images), -1, -1)
        return self.head(self.states(torch.cat((start, drawn), dim=1), memory))

    def next_patch(self, drawn: Tensor | None, memory: Tensor, cache: DecoderCache) -> Tensor:
        """The patch `[B, C, P_h, P_w]` that follows `drawn` `[B, n, C, P_h, P_w]`.

        `drawn` are the patches since the last call, None when there are none yet.
        """
        inputs = []
        if cache.length == 0:
            inputs.append(self.start.expand(len(memory), -1, -1))
        if drawn is not None:
            embedded = self.patch_embed(drawn.flatten(0, 1))  # each patch is a small image
            inputs.append(embedded.reshape(len(drawn), drawn.shape[1], -1))
        states = self.states(torch.cat(inputs, dim=1), memory, cache)
        return self.head(states[:, -1:], grid_size=(1, 1))


class PatchTransformer(nn.Module):
    """Encoder and decoder. `forward` reconstructs in one pass, `generate` draws.

        >>> from patchgen_fast.models import PatchTransformer
        >>> model = PatchTransformer.from_name("tiny").eval()
        >>> images = torch.rand(2, 3, 16, 16)
        >>> model(images).shape
        torch.Size([2, 3, 16, 16])
        >>> model.generate(model.encode(images)).shape
        torch.Size([2, 3, 16, 16])

    Images go in as floats on the scale 0 to 1 or as uint8, and come out as floats on that scale.
    """

    def __init__(self, config: PatchTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.apply(_initialise)

    @classmethod
    def from_name(cls, name: str) -> PatchTransformer:
        """A model of a named size (`patchgen_fast.models.CONFIGS`) with fresh weights."""
        if name not in CONFIGS:
            raise ValueError(f"expected a size out of {', '.join(CONFIGS)}, got {name!r}")
        return cls(CONFIGS[name])

    def encode(self, images: Tensor, num_given: int | None = None) -> Tensor:
        """The memory `[B, P + N, E]` of images, or of their first `num_given` patches only."""
        if num_given is not None:
            self._check_given(num_given)
        return self.encoder(images, num_given)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct images `[B, C, H, W]`: each patch from the memory and the true ones before.

        One pass over all patches; the loss of training compares the result with the images.
        """
        return self.to_pixels(self.decoder(images, self.encode(images)))

    def draw(
        self, memory: Tensor, given: Tensor | None = None, steps: int | None = None
    ) -> Iterator[Tensor]:
        """Draw patch by patch: yields `steps` patches `[B, C, P_h, P_w]`, in order.

        `given` `[B, n, C, P_h, P_w]` are the first patches of the image, where some are known;
        drawing goes on after them. `steps` is all that are missing unless told otherwise.
        """
        self._check_memory(memory)
        known = 0 if given is None else self._check_patches(given, len(memory))
        missing = self.config.num_patches - known
        steps = missing if steps is None else steps
        if not 0 <= steps <= missing:
            raise ValueError(
                f"expected at most {missing} steps, the patches that are missing, got {steps}"
            )
        return self._draw(memory, given, steps, known)

    @torch.no_grad()
    def _draw(
        self, memory: Tensor, given: Tensor | None, steps: int, known: int
    ) -> Iterator[Tensor]:
        if steps == 0:
            return
        cache = self.decoder.new_cache(memory, known + steps)
        drawn = given
        for _ in range(steps):
            patch = self.to_pixels(self.decoder.next_patch(drawn, memory, cache))
            yield patch
            drawn = patch[:, None]

    @torch.no_grad()
    def generate(
        self, memory: Tensor, given: Tensor | None = None, steps: int | None = None
    ) -> Tensor:
        """Draw images `[B, C, H, W]` from a memory, patch by patch, with a key-value cache.

        `given` and `steps` as in `draw`; patches beyond them stay 0.
        """
        shape = (len(memory), self.config.num_patches, *self.config.patch_shape)
        patches = memory.new_zeros(shape)
        known = 0
        drawing = self.draw(memory, given, steps)
        if given is not None:
            known = given.shape[1]
            patches[:, :known] = self._unit_scale(given)
        for index, patch in enumerate(drawing, start=known):
            patches[:, index] = patch
        return unpatchify(patches, self.config.grid_size)

    @torch.no_grad()
    def complete(self, images: Tensor, num_given: int) -> Tensor:
        """Keep the first `num_given` patches of images `[B, C, H, W]` and draw the others.

        Encoder and decoder see nothing of the patches that are not given.
        """
        self._check_given(num_given)
        memory = self.encode(images, num_given)
        patches = patchify(images, self.config.patch_size)[:, :num_given]
        return self.generate(memory, given=patches if num_given else None)

    def to_pixels(self, normalised: Tensor) -> Tensor:
        """Undo the normalisation of the input: the head's output to the scale 0 to 1."""
        return self.decoder.patch_embed.denormalise(normalised)

    @staticmethod
    def _unit_scale(images: Tensor) -> Tensor:
        return images / 255 if images.dtype == torch.uint8 else images

    def _check_given(self, num_given: int) -> None:
        if not 0 <= num_given <= self.config.num_patches:
            raise ValueError(
                f"expected between 0 and {self.config.num_patches} given patches, got {num_given}"
            )
        if num_given + self.config.prefix_tokens == 0:
            raise ValueError(
                "expected at least one given patch, because without prefix tokens there is "
                "nothing to encode; give a patch, or configure prefix_tokens=1"
            )

    def _check_memory(self, memory: Tensor) -> None:
        check_tokens(memory, self.config.dim, "memory")
        if memory.shape[1] == 0:
            raise ValueError("expected a memory of at least one token, got none; see encode()")

    def _check_patches(self, given: Tensor, batch: int) -> int:
        expected = (batch, *self.config.patch_shape)
        if given.dim() != 5 or (given.shape[0], *given.shape[2:]) != expected:
            raise ValueError(
                f"expected given patches [B, n, C, P_h, P_w] = [{batch}, n, "
                f"{', '.join(map(str, self.config.patch_shape))}], got {tuple(given.shape)}; "
                "patchify(images, patch_size)[:, :n] makes them"
            )
        if given.shape[1] > self.config.num_patches:
            raise ValueError(
                f"expected at most {self.config.num_patches} given patches, got {given.shape[1]}"
            )
        return given.shape[1]


def _initialise(module: nn.Module) -> None:
    """Small normal weights and zero biases, as vision transformers start."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
