"""Adapters for diffusers, by attention processors, each on its own module.

`set_attention_backend` would change the whole process and pass by the processors that call torch
themselves; a processor of ours on a module does neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention_processor as processors
from diffusers.models import embeddings
from diffusers.models.transformers import transformer_flux as flux
from torch import Tensor, nn

from ..modules.patch_conv import FastPatchConv2d
from ..modules.recording import record
from ..modules.state import LayerState, explain, state_of
from ..ops.attention import attention
from . import diffusers_feed_forward
from .adapters import Adapter, Reason, fingerprint, not_a_patch_conv


@dataclass
class ProcessorState(LayerState):
    """The state of a swapped module, whose processor is exchanged and not its class."""

    processor: Any = None
    """The processor that the module had."""

    def install(self, module: Any, target: type[nn.Module]) -> None:
        module.__dict__["_fast"] = self
        self.processor = module.processor
        module.processor = PROCESSORS[type(self.processor)]()

    def remove(self, module: Any) -> None:
        if type(module.processor) in PROCESSORS.values():  # else somebody chose another since
            module.processor = self.processor
        del module.__dict__["_fast"]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Heads `[B, H, N, D]` to joined heads `[B, N, H * D]`, by the module's backend."""
    state = state_of(module)
    if state is not None and not torch.compiler.is_compiling():
        state.calls += 1
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, query.dtype):
        mask = mask.to(query.dtype)
    backend = None if state is None else state.backend
    try:
        out: Any = attention(query, key, value, mask, backend=backend)
    except Exception as error:
        explain(error, state)
        raise
    record(module, query, key, mask, False, None)
    return out.transpose(1, 2).flatten(2).to(query.dtype)


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _normalised(norm: Any, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _out(attn: Any, x: Tensor) -> Tensor:
    out: Tensor = attn.to_out[1](attn.to_out[0](x))
    return out


class FastAttnProcessor(processors.AttnProcessor2_0):
    """`AttnProcessor2_0` (DiT, PixArt, UNets): self- and cross-attention, with masks."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        residual = x = hidden_states
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        if hidden_states.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        memory = x if encoder_hidden_states is None else encoder_hidden_states
        mask = attention_mask
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, memory.shape[1], len(memory))
            mask = mask.view(len(memory), attn.heads, -1, mask.shape[-1])
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            memory = x
        elif attn.norm_cross:
            memory = attn.norm_encoder_hidden_states(memory)
        query = _normalised(attn.norm_q, _heads(attn.to_q(x), attn.heads))
        key = _normalised(attn.norm_k, _heads(attn.to_k(memory), attn.heads))
        value = _heads(attn.to_v(memory), attn.heads)
        out = _out(attn, _attend(attn, query, key, value, mask))
        if hidden_states.dim() == 4:
            out = out.transpose(-1, -2).reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


class FastJointAttnProcessor(processors.JointAttnProcessor2_0):
    """`JointAttnProcessor2_0` (SD3): image and text tokens attend to each other."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        x, text = hidden_states, encoder_hidden_states
        query = _normalised(attn.norm_q, _heads(attn.to_q(x), attn.heads))
        key = _normalised(attn.norm_k, _heads(attn.to_k(x), attn.heads))
        value = _heads(attn.to_v(x), attn.heads)
        if text is None:
            return _out(attn, _attend(attn, query, key, value))
        own = (
            _normalised(attn.norm_added_q, _heads(attn.add_q_proj(text), attn.heads)),
            _normalised(attn.norm_added_k, _heads(attn.add_k_proj(text), attn.heads)),
            _heads(attn.add_v_proj(text), attn.heads),
        )
        query, key, value = (
            torch.cat(pair, dim=2) for pair in zip((query, key, value), own, strict=True)
        )
        joined = _attend(attn, query, key, value)
        x, text = joined.split_with_sizes([x.shape[1], text.shape[1]], dim=1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return _out(attn, x), text


class FastFluxAttnProcessor(flux.FluxAttnProcessor):
    """`FluxAttnProcessor`: text before image, rotary positions."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        text = encoder_hidden_states
        projected = flux._get_qkv_projections(attn, hidden_states, text)
        split: list[Any] = [
            None if x is None else x.unflatten(-1, (-1, attn.head_dim)) for x in projected
        ]
        query, key, value, *of_text = split
        query, key = attn.norm_q(query), attn.norm_k(key)
        if attn.added_kv_proj_dim is not None:
            own = (attn.norm_added_q(of_text[0]), attn.norm_added_k(of_text[1]), of_text[2])
            query, key, value = (
                torch.cat(pair, dim=1) for pair in zip(own, (query, key, value), strict=True)
            )
        if image_rotary_emb is not None:
            query = flux.apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = flux.apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        joined = _attend(attn, query, key, value, attention_mask)
        if text is None:
            return joined
        text_length = text.shape[1]
        text, x = joined.split_with_sizes([text_length, joined.shape[1] - text_length], dim=1)
        return _out(attn, x.contiguous()), attn.to_add_out(text.contiguous())


PROCESSORS: dict[type, type] = {
    processors.AttnProcessor2_0: FastAttnProcessor,
    processors.JointAttnProcessor2_0: FastJointAttnProcessor,
    flux.FluxAttnProcessor: FastFluxAttnProcessor,
}
# of the processors' calls, in this order: of diffusers 0.42
FINGERPRINTS = ("fc56562b63cd9db9", "74c3867bad49530d", "b77db15d1aa88ba5")


def _refuse(module: Any) -> Reason | None:
    processor = getattr(module, "processor", None)
    if type(processor) not in PROCESSORS:
        name = type(processor).__name__
        return Reason("processor", f"its processor {name} does more than plain attention")
    position = list(PROCESSORS).index(type(processor))
    if fingerprint(type(processor), "__call__") != FINGERPRINTS[position]:
        return Reason("unknown_version", "its processor differs from the versions that are known")
    if getattr(processor, "_attention_backend", None) is not None:
        return Reason("attention_backend", "set_attention_backend chose another; reset that first")
    if getattr(processor, "_parallel_config", None) is not None:
        return Reason("context_parallel", "its tokens are spread over processes")
    return None


ADAPTERS = (
    *(
        Adapter(cls, cls, "attention", refuse=_refuse, state=ProcessorState)
        for cls in (processors.Attention, flux.FluxAttention)
    ),
    *diffusers_feed_forward.ADAPTERS,
)
PARTS = {
    embeddings.PatchEmbed: {
        "proj": Adapter(nn.Conv2d, FastPatchConv2d, "patch_embed", refuse=not_a_patch_conv)
    }
}
