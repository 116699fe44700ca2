"""Sizes of the patch transformer, from one that trains in seconds to ViT-L."""

from __future__ import annotations

from dataclasses import dataclass

from .patches import Size2d, grid_of, pair
from .positions import KINDS, PositionKind


@dataclass(frozen=True)
class PatchTransformerConfig:
    """Everything that fixes the shape of a `PatchTransformer`. Hashable; change with `replace`.

    Images are `[B, channels, *image_size]`, floats on the scale 0 to 1 or uint8; `mean` and `std`
    (per channel, on that scale) normalise them inside the model. The encoder is a vision
    transformer of `depth` layers, the decoder has `decoder_depth` layers. `prefix_tokens` learned
    tokens (ViT's class token is one) run before the patches through the encoder.
    """

    image_size: Size2d
    patch_size: Size2d
    channels: int = 3
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 8
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_norm: bool = False
    positions: PositionKind = "learned"
    prefix_tokens: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    norm_eps: float = 1e-6
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        grid_of(self.image_size, self.patch_size)
        if self.positions not in KINDS:
            raise ValueError(f"expected positions out of {KINDS}, got {self.positions!r}")
        for name in ("channels", "depth", "decoder_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return grid_of(self.image_size, self.patch_size)

    @property
    def image_size_pair(self) -> tuple[int, int]:
        """(H, W) of an image."""
        return pair(self.image_size)

    @property
    def num_patches(self) -> int:
        """N, the number of patches in an image."""
        rows, columns = self.grid_size
        return rows * columns

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """(C, P_h, P_w) of one patch."""
        return (self.channels, *pair(self.patch_size))


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CONFIGS: dict[str, PatchTransformerConfig] = {
    # for tests: 16 patches of 4 x 4
    "tiny": PatchTransformerConfig(
        image_size=16,
        patch_size=4,
        dim=32,
        depth=2,
        num_heads=4,
        decoder_dim=32,
        decoder_depth=2,
        decoder_num_heads=4,
    ),
    # for the 8 x 8 scanned digits: 16 patches of 2 x 2
    "small": PatchTransformerConfig(
        image_size=8,
        patch_size=2,
        channels=1,
        dim=96,
        depth=4,
        num_heads=4,
        decoder_dim=96,
        decoder_depth=4,
        decoder_num_heads=4,
        mean=(0.5,),
        std=(0.5,),
    ),
    # for 64 x 64 pictures: 256 patches of 4 x 4
    "medium": PatchTransformerConfig(
        image_size=64,
        patch_size=4,
        dim=384,
        depth=6,
        num_heads=6,
        decoder_dim=384,
        decoder_depth=6,
        decoder_num_heads=6,
        positions="sincos_2d",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    # the encoder is ViT-B/16 at 224 x 224: 196 patches and a class token
    "vit_b_16": PatchTransformerConfig(
        image_size=224,
        patch_size=16,
        prefix_tokens=1,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    # the encoder is ViT-L/16 at 224 x 224
    "vit_l_16": PatchTransformerConfig(
        image_size=224,
        patch_size=16,
        dim=1024,
        depth=24,
        num_heads=16,
        prefix_tokens=1,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
}
