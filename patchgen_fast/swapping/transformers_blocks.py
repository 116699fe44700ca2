"""transformers' feed-forward parts, and the layers whose sums join them.

Each model of transformers has classes of its own, which repeat a few forwards to the letter. So a
class is known by the exact source of its `forward`: every class with one of the sources below gets
a fast subclass, made when it is first met. A source that differs in anything is another class.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations

from ..modules.fused import (
    ACTIVATION_TYPES,
    IN_PLACE,
    add_then_norm,
    add_to_residual,
    inactive,
    normalise,
    project,
    quick_gelu_,
    takes_residual,
)
from ..modules.state import FastLayer
from .adapters import Adapter

LIBRARY = "transformers.models."

ACTIVATION_TYPES[activations.GELUActivation] = "gelu"
ACTIVATION_TYPES[activations.GELUTanh] = "gelu_tanh"
ACTIVATION_TYPES[activations.NewGELUActivation] = "gelu_tanh"
ACTIVATION_TYPES[activations.AccurateGELUActivation] = "gelu_tanh"
ACTIVATION_TYPES[activations.SiLUActivation] = "silu"
IN_PLACE[activations.QuickGELUActivation] = quick_gelu_


# ------------------------------------------------------------------------------------ feed-forward


@dataclass(frozen=True)
class Names:
    """What a feed-forward class calls its parts.

    `second(drop(activation(first(x))))`, dropped once more where there are two dropouts; with
    `gate`, `second(activation(gate(x)) * first(x))`; without `second`, its first half alone.
    """

    first: str
    activation: str | Callable[[Tensor], Tensor]
    second: str | None
    gate: str | None = None
    drops: tuple[str, ...] = ()
    """Dropouts after the activation and after the second map: modules, or probabilities."""


class FastFeedForward(FastLayer):
    """Feed-forward of one argument, by the names of its class."""

    _names: Names

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())  # each class calls it otherwise
        return self.fused_forward(x)

    def fused_forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """`forward(x) + residual`."""
        self._count_call()
        names = self._names
        activation = names.activation
        if isinstance(activation, str):
            activation = getattr(self, activation)
        if names.gate is None:
            hidden = project(self, x, getattr(self, names.first), activation=activation)
        else:
            gate = project(self, x, getattr(self, names.gate), activation=activation)
            hidden = gate * project(self, x, getattr(self, names.first))
        if names.second is None:
            return hidden if residual is None else residual + hidden
        if names.drops:
            hidden = self._dropped(hidden, names.drops[0])
        second = getattr(self, names.second)
        if not names.drops or self._is_inactive(names.drops[-1]):
            return project(self, hidden, second, residual=residual)
        out = self._dropped(project(self, hidden, second), names.drops[-1])
        return out if residual is None else residual + out

    def _is_inactive(self, name: str) -> bool:
        drop = getattr(self, name)
        if isinstance(drop, nn.Module):
            return inactive(drop)
        return not self.training or drop == 0.0  # type: ignore[attr-defined]

    def _dropped(self, x: Tensor, name: str) -> Tensor:
        if self._is_inactive(name):
            return x
        drop = getattr(self, name)
        return drop(x) if isinstance(drop, nn.Module) else F.dropout(x, drop)


class FastOutput(FastLayer):
    """What follows the first half where that is a class of its own, with the sum if there is one.

    The map after the attention heads has the same source in some models.
    """

    dense: Any
    dropout: Any

    def forward(self, hidden_states: Tensor, input_tensor: Tensor | None = None) -> Tensor:
        self._count_call()
        if inactive(self.dropout):
            return project(self, hidden_states, self.dense, residual=input_tensor)
        out: Tensor = self.dropout(project(self, hidden_states, self.dense))
        return out if input_tensor is None else out + input_tensor


# ------------------------------------------------------------------------------------------ layers


class _FastBlock(FastLayer):
    """A pre-norm block: `x + branch`, twice; sums join the normalisation or the product."""

    mlp: Any

    def _block(self, x: Tensor, branch: Tensor, norm: Any) -> Tensor:
        x, normalised = add_then_norm(self, x, branch, norm)
        return add_to_residual(x, self.mlp, normalised)


class FastClipLayer(_FastBlock):
    """The layer of CLIP, SigLIP and their kin."""

    layer_norm1: Any
    layer_norm2: Any
    self_attn: Any

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any):
        self._count_call()
        normalised = normalise(self, hidden_states, self.layer_norm1)
        branch, _ = self.self_attn(
            hidden_states=normalised, attention_mask=attention_mask, **kwargs
        )
        return self._block(hidden_states, branch, self.layer_norm2)


class FastBlipLayer(FastClipLayer):
    """BLIP's layer: CLIP's without a mask."""

    def forward(self, hidden_states: Tensor, **kwargs: Any):  # type: ignore[override]
        self._count_call()
        normalised = normalise(self, hidden_states, self.layer_norm1)
        branch, _ = self.self_attn(hidden_states=normalised, **kwargs)
        return self._block(hidden_states, branch, self.layer_norm2)


class FastViTLayer(_FastBlock):
    """The layer of ViT, DeiT, I-JEPA, ViViT and their kin."""

    layernorm_before: Any
    layernorm_after: Any
    attention: Any
    dropout: Any

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any):
        self._count_call()
        normalised = normalise(self, hidden_states, self.layernorm_before)
        branch, _ = self.attention(normalised, attention_mask, **kwargs)
        if inactive(self.dropout):
            return self._block(hidden_states, branch, self.layernorm_after)
        x, normalised = add_then_norm(
            self, hidden_states, self.dropout(branch), self.layernorm_after
        )
        return self.dropout(self.mlp(normalised)) + x


class FastDinoLayer(FastLayer):
    """The layer of DINOv2, DINOv3 and their kin: branches are scaled."""

    norm1: Any
    attention: Any
    layer_scale1: Any
    drop_path: Any
    norm2: Any
    mlp: Any
    layer_scale2: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ):
        self._count_call()
        if position_embeddings is not None:  # DINOv3's
            kwargs["position_embeddings"] = position_embeddings
        normalised = normalise(self, hidden_states, self.norm1)
        branch, _ = self.attention(normalised, attention_mask=attention_mask, **kwargs)
        branch = self.drop_path(self.layer_scale1(branch))
        x, normalised = add_then_norm(self, hidden_states, branch, self.norm2)
        return self.drop_path(self.layer_scale2(self.mlp(normalised))) + x


class FastPackedLayer(_FastBlock):
    """The vision block of the Qwen-VL family: packed images."""

    norm1: Any
    norm2: Any
    attn: Any

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ):
        self._count_call()
        branch = self.attn(
            normalise(self, hidden_states, self.norm1),
            cu_seqlens=cu_seqlens,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return self._block(hidden_states, branch, self.norm2)


# ------------------------------------------------------------------------------------- who is known

FC = Names("fc1", "activation_fn", "fc2")
DROP = Names("fc1", "act", "fc2", drops=("drop", "drop"))
GATED = Names("up_proj", "act_fn", "down_proj", gate="gate_proj")

# forwards as transformers 5.23 has them, by the hash of their source
FEED_FORWARDS = {
    "2bbd04211d2751d4": FC,  # ViT, DeiT, DINOv2, CLIP, SigLIP, BEiT and many more
    "1fce95b8c71c940f": Names("fc1", "activation", "fc2"),  # ViTPose, V-JEPA 2
    "b583608dd70c7aa9": Names("fc1", "act", "fc2"),  # Qwen2-VL
    "072b0f6d9766aba8": Names("linear_fc1", "act_fn", "linear_fc2"),  # Qwen3-VL
    "42b5ea7aa8e7d75b": Names("up_proj", "act_fn", "down_proj"),  # DINOv3
    "89a70e256af9713e": Names("lin1", "act", "lin2"),  # SAM
    "779aa1114fc460ae": DROP,  # ViTDet
    "13bdfcf06b759949": DROP,  # MGP-STR
    "11bda47b63efba33": Names("fc1", "activation", "fc2", drops=("drop", "drop")),  # FocalNet
    "3b104c0e13561627": Names(  # DETR
        "fc1", "activation_fn", "fc2", drops=("activation_dropout", "dropout")
    ),
    "4cd949b84db8e002": GATED,  # DINOv2's and DINOv3's SwiGLU, AIMv2, Pixtral; Llama
    "e5a658ad326f2ab9": GATED,  # Qwen2.5-VL, GLM-4V
    "99222b327e2207be": GATED,  # Idefics
    "571d9a54767bb8aa": Names("w3", F.silu, "w2", gate="w1"),  # LFM
    "f3694455008b42c7": Names("dense", "intermediate_act_fn", None),  # BERT's, YOLOS, DPT, VideoMAE
}
OUTPUTS = {
    "ec67b85adb2c3283",  # YOLOS, DPT, VideoMAE, ViLT, FLAVA
    "d5c2346d9efbb4a3",  # without the sum: Swin v2, Donut, TimeSformer, Data2Vec
}
LAYERS: dict[str, type[FastLayer]] = {
    "f173e84dce5adeb0": FastClipLayer,
    "b5847b7d3aef8349": FastClipLayer,  # SigLIP
    "b56baf8e6e9a50cb": FastBlipLayer,
    "6adb1b7a39b99025": FastViTLayer,
    "82fdadbcbb45a209": FastDinoLayer,  # DINOv2
    "10f9e46ab0bd9f57": FastDinoLayer,  # DINOv3
    "7c5952975d7dc092": FastPackedLayer,  # Qwen2-VL
    "56232bd17d99d56c": FastPackedLayer,  # Qwen2.5-VL, Qwen3-VL, GLM-4V
}


@cache
def adapter_for(cls: type) -> Adapter | None:
    """The adapter of a class with one of the known forwards, or of the fast class made of it."""
    if cls.__module__ == __name__:
        return adapter_for(cls.__bases__[-1])
    if not cls.__module__.startswith(LIBRARY):
        return None
    try:
        source = " ".join(inspect.getsource(cls.forward).split())  # type: ignore[attr-defined]
    except (OSError, TypeError, AttributeError):
        return None
    print_ = hashlib.sha256(source.encode()).hexdigest()[:16]
    if print_ in FEED_FORWARDS:
        target = _subclass(FastFeedForward, cls, _names=FEED_FORWARDS[print_])
        return Adapter(cls, takes_residual(target), "feed_forward")
    if print_ in OUTPUTS:
        return Adapter(cls, _subclass(FastOutput, cls), "feed_forward")
    if print_ in LAYERS:
        return Adapter(cls, _subclass(LAYERS[print_], cls), "layer")
    return None


def _subclass(fast: type[FastLayer], source: type, **attributes: Any) -> type:
    """A class that `__getattr__` finds again by its name, so that its objects can be pickled."""
    name = f"{source.__module__.removeprefix(LIBRARY)}.{source.__qualname__}".replace(".", "__")
    return type(name, (fast, source), {"__module__": __name__, **attributes})


def __getattr__(name: str) -> Any:
    path, _, cls = name.replace("__", ".").rpartition(".")
    if path:
        try:
            adapter = adapter_for(getattr(import_module(LIBRARY + path), cls))
        except (ImportError, AttributeError):
            adapter = None
        if adapter is not None:
            return adapter.target
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
