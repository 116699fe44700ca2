"""Adapters for transformers, through the interface that it has for it.

Its attention modules ask `ALL_ATTENTION_FUNCTIONS` for the function named by their configuration.
A swapped module gets a configuration of its own that names ours; its class, its parameters and the
model's configuration stay as they are. Masks are made by the model, for its own implementation:
only modules whose implementation is "sdpa" are swapped, and our function takes exactly what that
one takes, so a padding mask can't get lost on the way.

A module that packs several images into one sequence asks for them one by one, unless it is told
that flash attention is there: then it hands over where each begins. So such modules get a
configuration that names `PACKED`, and one call of `varlen_attention` serves all images.

Both interfaces know the name "patchgen_fast" once this file is imported, so that a model may also
be built with `attn_implementation="patchgen_fast"`.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from ..modules.patch_conv import FastPatchConv2d, FastPatchConv3d, is_patch_conv
from ..modules.recording import is_recording, record
from ..modules.state import LayerState, explain, state_of
from ..ops.attention import attention
from ..ops.varlen_attention import varlen_attention
from . import transformers_blocks
from .adapters import Adapter, Reason, not_a_patch_conv

NAME = "patchgen_fast"
PACKED = "patchgen_fast_flash_varlen"  # transformers looks for "flash" in the name
# of `sdpa_attention_forward`, whose contract ours is: of transformers 5.23
FINGERPRINTS = ("6f100a288695f845",)


@dataclass
class InterfaceState(LayerState):
    """The state of a swapped module, whose configuration is exchanged and not its class."""

    config: Any = None
    """The configuration that the module had."""

    def install(self, module: Any, target: type[nn.Module]) -> None:
        module.__dict__["_fast"] = self
        self.config = module.config
        module.config = copy.copy(self.config)
        # The property would tell the configurations inside, which the copy shares.
        packs = "cu_seq_lens_q=" in _source_of_forward(module.__class__)
        module.config._attn_implementation_internal = PACKED if packs else NAME

    def remove(self, module: Any) -> None:
        if module.config._attn_implementation in (
            NAME,
            PACKED,
        ):  # else somebody chose another since
            module.config = self.config
        del module.__dict__["_fast"]


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: `[B, H, N, D]` to `[B, N, H, D]`, as its "sdpa" does.

    What can't be done here goes to that one, and is counted.
    """
    state = state_of(module)
    counted = None if torch.compiler.is_compiling() else state
    if counted is not None:
        counted.calls += 1
    reason = _reason_against(query, key, value, attention_mask, kwargs)
    if reason is not None:
        if counted is not None:
            counted.fell_back[reason] = counted.fell_back.get(reason, 0) + 1
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return out
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    if attention_mask is not None and attention_mask.dtype not in (
        torch.bool,
        torch.float32,
        query.dtype,
    ):
        attention_mask = attention_mask.to(query.dtype)
    try:
        heads: Any = attention(
            query,
            key,
            value,
            attention_mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            backend=None if state is None else state.backend,
        )
    except Exception as error:
        explain(error, state)
        raise
    record(module, query, key, attention_mask, causal, scaling)
    return heads.transpose(1, 2), None


def _reason_against(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> str | None:
    """Why a call goes to transformers' own function, as a code for reports."""
    for name in ("position_bias", "cache", "softcap"):
        if kwargs.get(name) is not None:
            return name
    if mask is not None and not isinstance(mask, Tensor):
        return "mask_type"
    if value.shape != key.shape or query.shape[-1] != key.shape[-1]:
        return "value_shape"
    if query.shape[0] != key.shape[0]:
        return "batch"
    return None


def packed_attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for packed images: `[1, H, T, D]` to `[1, T, H, D]`.

    Image s lies from token `cu_seq_lens_q[s]` to `cu_seq_lens_q[s + 1]`; each attends to itself.
    Without those it is a batch like any other.
    """
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        return attention_function(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if is_causal is None:  # as in `attention_function`, whichever op serves
        is_causal = getattr(module, "is_causal", True)
    state = state_of(module)
    if dropout > 0.0 or is_recording():  # `varlen_attention` has no dropout and no weights
        lengths = cu_seq_lens_q.diff().tolist()
        images = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        outs = [
            attention_function(module, q, k, v, None, dropout, scaling, is_causal)[0]
            for q, k, v in images
        ]
        return torch.cat(outs, dim=1), None
    if state is not None and not torch.compiler.is_compiling():
        state.calls += 1
    try:
        out: Any = varlen_attention(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            cu_seq_lens_q.int(),
            cu_seq_lens_k.int(),
            max_length_q,
            max_length_k,
            is_causal=bool(is_causal),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            backend=None if state is None else state.backend,
        )
    except Exception as error:
        explain(error, state)
        raise
    return out[None], None


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionInterface.register(PACKED, packed_attention_function)
AttentionMaskInterface.register(PACKED, sdpa_mask)


@lru_cache(maxsize=1)
def _known_version() -> bool:
    source = " ".join(inspect.getsource(sdpa_attention_forward).split())
    return hashlib.sha256(source.encode()).hexdigest()[:16] in FINGERPRINTS


@cache
def _source_of_forward(cls: type) -> str:
    try:
        return inspect.getsource(cls.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError, AttributeError):
        return ""


@cache
def _asks_the_interface(cls: type) -> bool:
    """Whether a class takes its attention function from the interface, by its configuration."""
    if not cls.__module__.startswith("transformers.models."):
        return False
    source = _source_of_forward(cls)
    asked = "ALL_ATTENTION_FUNCTIONS.get_interface(" in source
    return asked and "self.config._attn_implementation" in source


def _refuse(module: Any) -> Reason | None:
    if not _known_version():
        return Reason("unknown_version", "this transformers calls attention in a way not known yet")
    named = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if named == "sdpa":
        return None
    return Reason(
        "implementation",
        f"its attn_implementation is {named!r}; build the model with attn_implementation='sdpa', "
        "or call model.set_attn_implementation('sdpa') before the swap",
    )


def adapter_for(cls: type) -> Adapter | None:
    """The adapter of an attention class that asks the interface, a feed-forward part or a layer."""
    if _asks_the_interface(cls):
        return Adapter(cls, cls, "attention", refuse=_refuse, state=InterfaceState)
    return transformers_blocks.adapter_for(cls)


_CONVOLUTIONS: dict[type, Adapter] = {
    nn.Conv2d: Adapter(nn.Conv2d, FastPatchConv2d, "patch_embed", refuse=not_a_patch_conv),
    nn.Conv3d: Adapter(nn.Conv3d, FastPatchConv3d, "patch_embed", refuse=not_a_patch_conv),
}
TARGETS = {adapter.target: adapter for adapter in _CONVOLUTIONS.values()}
MOST_CHANNELS = 4  # of an image; a convolution of more is not the patch embedding


def parts_of(module: nn.Module) -> dict[str, Adapter]:
    """The bare convolutions with stride = kernel that a module applies to images."""
    if not type(module).__module__.startswith("transformers.models."):
        return {}
    return {
        name: _CONVOLUTIONS[type(child)]
        for name, child in module.named_children()
        if type(child) in _CONVOLUTIONS
        and is_patch_conv(child)
        and child.in_channels <= MOST_CHANNELS  # type: ignore[operator]
    }


ADAPTERS: tuple[Adapter, ...] = ()
