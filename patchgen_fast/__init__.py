"""Fast layers for patch transformers: kernels behind torch ops, drop-in modules, benchmarks.

Everything public is imported from here and loaded when it is first asked for, so that
`import patchgen_fast` costs nothing and imports neither torch nor triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "add_layer_norm": "patchgen_fast.ops.add_layer_norm",
    "attention": "patchgen_fast.ops.attention",
    "layer_norm": "patchgen_fast.ops.layer_norm",
    "linear": "patchgen_fast.ops.linear",
    "patch_embed": "patchgen_fast.ops.patch_embed",
    "patch_unembed": "patchgen_fast.ops.patch_unembed",
    "qk_norm_rope": "patchgen_fast.ops.qk_norm_rope",
    "varlen_attention": "patchgen_fast.ops.varlen_attention",
    "Attention": "patchgen_fast.modules",
    "CrossAttention": "patchgen_fast.modules",
    "DecoderLayer": "patchgen_fast.modules",
    "EncoderLayer": "patchgen_fast.modules",
    "FeedForward": "patchgen_fast.modules",
    "MultiheadAttention": "patchgen_fast.modules",
    "PatchEmbed": "patchgen_fast.modules",
    "PatchUnembed": "patchgen_fast.modules",
    "profile": "patchgen_fast.profiling.api",
    "attention_maps": "patchgen_fast.swapping",
    "empty_cache": "patchgen_fast.memory",
    "swap": "patchgen_fast.swapping",
    "swapped": "patchgen_fast.swapping",
    "verify": "patchgen_fast.swapping",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .memory import empty_cache as empty_cache
    from .modules import Attention as Attention
    from .modules import CrossAttention as CrossAttention
    from .modules import DecoderLayer as DecoderLayer
    from .modules import EncoderLayer as EncoderLayer
    from .modules import FeedForward as FeedForward
    from .modules import MultiheadAttention as MultiheadAttention
    from .modules import PatchEmbed as PatchEmbed
    from .modules import PatchUnembed as PatchUnembed
    from .ops.add_layer_norm import add_layer_norm as add_layer_norm
    from .ops.attention import attention as attention
    from .ops.layer_norm import layer_norm as layer_norm
    from .ops.linear import linear as linear
    from .ops.patch_embed import patch_embed as patch_embed
    from .ops.patch_unembed import patch_unembed as patch_unembed
    from .ops.qk_norm_rope import qk_norm_rope as qk_norm_rope
    from .ops.varlen_attention import varlen_attention as varlen_attention
    from .profiling.api import profile as profile
    from .swapping import attention_maps as attention_maps
    from .swapping import swap as swap
    from .swapping import swapped as swapped
    from .swapping import verify as verify


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'patchgen_fast' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
