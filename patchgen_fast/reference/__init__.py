"""Eager PyTorch for every op: the specification and the oracle.

Each op has a forward in plain stock operators, differentiable by torch's own autograd, and an
explicit backward that serves any kernel that has none of its own. Nothing here is fused, and
nothing is clever.

``arithmetic`` is the dtype of everything in between. By default it is float32, or float64 for
float64 inputs; ``torch.float64`` on any input gives the truth that tests compare with, and the
input's own dtype gives what a user's eager model computes, the yardstick of the parity rule.
"""

from ._arithmetic import arithmetic_dtype
from ._attention import (
    attendable,
    attention,
    attention_backward,
    attention_lse,
    varlen_attention,
    varlen_attention_backward,
)
from ._dense import (
    ACTIVATIONS,
    activation_backward,
    add_layer_norm,
    add_layer_norm_backward,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_backward,
)
from ._patches import (
    cut,
    grid_of,
    normalised_pixels,
    paste,
    patch_embed,
    patch_embed_backward,
    patch_unembed,
    patch_unembed_backward,
)
from ._qk_norm_rope import qk_norm_rope, qk_norm_rope_backward, rotate

__all__ = [
    "ACTIVATIONS",
    "activation_backward",
    "add_layer_norm",
    "add_layer_norm_backward",
    "arithmetic_dtype",
    "attendable",
    "attention",
    "attention_backward",
    "attention_lse",
    "cut",
    "grid_of",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "linear_backward",
    "normalised_pixels",
    "paste",
    "patch_embed",
    "patch_embed_backward",
    "patch_unembed",
    "patch_unembed_backward",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "rotate",
    "varlen_attention",
    "varlen_attention_backward",
]
