"""diffusers' transformers of images for the sweep: DiT, PixArt, SD3 and Flux, made small."""

from __future__ import annotations

from typing import Any

import torch
from sweep_examine import Entry, Small, examine
from torch import nn

from patchgen_fast._torchvision import make_importable

NARROW = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2}
LATENTS = {"sample_size": 16, "patch_size": 2, "in_channels": 4}
TEXT = 7  # tokens of the prompt
STEPS = torch.tensor([1, 500])


def _latents() -> torch.Tensor:
    return torch.randn(2, 4, 16, 16)


def _dit() -> tuple[dict[str, Any], dict[str, Any]]:
    changes = {**NARROW, **LATENTS, "out_channels": 8, "num_embeds_ada_norm": 10}
    inputs = {"hidden_states": _latents(), "timestep": STEPS, "class_labels": torch.tensor([1, 2])}
    return {**changes, "norm_num_groups": 2}, inputs


def _pixart() -> tuple[dict[str, Any], dict[str, Any]]:
    changes = {**NARROW, **LATENTS, "cross_attention_dim": 64, "caption_channels": 24}
    padding = torch.ones(2, TEXT)
    padding[0, 3:] = 0
    inputs = {
        "hidden_states": _latents(),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "encoder_attention_mask": padding,
        "timestep": STEPS,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return {**changes, "norm_num_groups": 2, "use_additional_conditions": False}, inputs


def _sd3() -> tuple[dict[str, Any], dict[str, Any]]:
    changes = {**NARROW, **LATENTS, "caption_projection_dim": 64, "joint_attention_dim": 24}
    inputs = {
        "hidden_states": _latents(),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": STEPS,
    }
    return {**changes, "pooled_projection_dim": 20, "pos_embed_max_size": 16}, inputs


def _sd3_5() -> tuple[dict[str, Any], dict[str, Any]]:
    changes, inputs = _sd3()
    return {**changes, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}, inputs


def _flux() -> tuple[dict[str, Any], dict[str, Any]]:
    changes = {
        "patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1,
        "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 24,
        "pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 64, 8),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.tensor([0.1, 0.5]),
        "img_ids": torch.rand(64, 3),
        "txt_ids": torch.rand(TEXT, 3),
    }
    return changes, inputs


# name -> (class, what makes it small and its inputs)
MODELS = {
    "DiT": ("DiTTransformer2DModel", _dit),
    "PixArt": ("PixArtTransformer2DModel", _pixart),
    "SD3": ("SD3Transformer2DModel", _sd3),
    "SD3.5": ("SD3Transformer2DModel", _sd3_5),
    "Flux": ("FluxTransformer2DModel", _flux),
}


def models() -> list[str]:
    make_importable()
    return list(MODELS)


def examine_model(name: str) -> Entry:
    import diffusers

    cls, made_small = MODELS[name]

    def build() -> nn.Module:
        model: nn.Module = getattr(diffusers, cls)(**made_small()[0])
        return model

    def small(whole: nn.Module) -> Small:
        return build(), (), made_small()[1]

    return examine(name, build, small, sample=1)  # all: they are few
