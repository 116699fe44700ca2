"""The patch transformer in plain eager PyTorch. `patchgen_fast.swap` makes it fast."""

from .cache import DecoderCache, KeyValueCache, LayerCache
from .configs import CONFIGS, PatchTransformerConfig
from .layers import (
    Attention,
    CrossAttention,
    DecoderLayer,
    EncoderLayer,
    FeedForward,
    PatchEmbed,
    PatchUnembed,
)
from .patches import patchify, unpatchify
from .positions import position_table, sincos_2d, sinusoidal
from .transformer import Decoder, Encoder, PatchTransformer

__all__ = [
    "CONFIGS",
    "Attention",
    "CrossAttention",
    "Decoder",
    "DecoderCache",
    "DecoderLayer",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "KeyValueCache",
    "LayerCache",
    "PatchEmbed",
    "PatchTransformer",
    "PatchTransformerConfig",
    "PatchUnembed",
    "patchify",
    "position_table",
    "sincos_2d",
    "sinusoidal",
    "unpatchify",
]
