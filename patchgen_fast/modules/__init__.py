"""Fast drop-in modules: the eager layers' parameters, timm's arguments, fused around the core."""

from .attention import Attention, CrossAttention
from .feed_forward import FeedForward
from .layers import DecoderLayer, EncoderLayer
from .multihead_attention import MultiheadAttention
from .patch_embed import PatchEmbed, PatchUnembed

__all__ = [
    "Attention",
    "CrossAttention",
    "DecoderLayer",
    "EncoderLayer",
    "FeedForward",
    "MultiheadAttention",
    "PatchEmbed",
    "PatchUnembed",
]
